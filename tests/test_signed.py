"""Plans signed before the run: a run keeps to them, or says why not; a bundle shows which."""

import json

import pytest
from command_line import repro
from test_workflow import failed, resealed

from records import canonical, keys
from records.errors import InvalidError, MalformedError, UsageError
from records.package import read_bundle
from records.statement import make_statement, open_envelope, sign_envelope
from repro.workflow import signed
from repro.workflow.plan import parse_plan, plan_digest
from repro.workflow.signed import SIGNED_PLAN, adopt, check_signed, deviated, read_signed, sign_plan, verify_signed

KEY = keys.private_key(bytes(range(32)))
TIME = "2026-11-22T00:00:00Z"


@pytest.fixture(scope="module")
def plan(smoke_bundle):
    return parse_plan(read_bundle(smoke_bundle)["plan.json"], name="plan")


def elsewhere(plan: dict) -> dict:
    """The plan as another machine with other code would have made it."""
    return plan | {
        "code": plan["code"] | {"sha256": "1" * 64},
        "environment": plan["environment"] | {"torch": "1.0"},
    }


def test_a_signed_plan_is_a_statement_about_plan_json(plan):
    data = sign_plan(plan, key=KEY, signed_at=TIME)
    statement = open_envelope(data).statement
    assert statement["subject"] == [{"name": "plan.json", "digest": {"sha256": plan_digest(plan)}}]
    assert read_signed(data).plan == plan
    assert verify_signed(data, trusted=keys.pinned()).state == "valid"
    mine = keys.KeySet(keys=(keys.PublicKey(key_id=KEY.key_id, raw=KEY.public.raw, source="file"),))
    assert verify_signed(data, trusted=mine).state == "trusted"


def test_a_signed_plan_of_another_form(plan):
    predicate = {"schema": "repro.signed-plan/v1", "plan": plan, "key": None, "signed_at": TIME}

    def made(subject: str = plan_digest(plan), kind: str = signed.PLAN_TYPE, **changes) -> bytes:
        return sign_envelope(make_statement("plan.json", subject, kind, predicate | changes), KEY)

    for data, state in (
        (made(subject="0" * 64), "invalid"),
        (made(kind="urn:pith-repro:plan:v2"), "malformed"),
        (made(schema="repro.signed-plan/v2"), "malformed"),
        (made(signed_at="now"), "malformed"),
        (made(signed_at=None), "malformed"),
        (made(key=7), "malformed"),
        (made(more=1), "malformed"),
        (made(plan={}), "malformed"),
        (b"[]", "malformed"),
        (made(), "indeterminate"),  # no key at hand: nobody vouches for it
    ):
        assert verify_signed(data, trusted=keys.pinned()).state == state
    changed = json.loads(sign_plan(plan, key=KEY, signed_at=TIME))
    other = json.loads(sign_plan(plan | {"seeds": [5]}, key=KEY, signed_at=TIME))
    found = verify_signed(canonical.dumps(changed | {"payload": other["payload"]}), trusted=keys.pinned())
    assert [check.code for check in found.checks if check.status == "fail"] == ["envelope_signature"]


def test_a_plan_is_adopted_where_it_fits_and_refused_where_not(plan, tmp_path):
    path = tmp_path / "plan.dsse.json"
    path.write_bytes(sign_plan(plan, key=KEY, signed_at=TIME))
    assert adopt(path, why=None, trusted=keys.pinned())[0] == plan
    with pytest.raises(UsageError, match="leave it out"):
        adopt(path, why="no need", trusted=keys.pinned())
    path.write_bytes(sign_plan(elsewhere(plan), key=KEY, signed_at=TIME))
    with pytest.raises(UsageError, match=r"not the plan's here: code .*; torch \(expected 1\.0, found .*--deviate"):
        adopt(path, why=None, trusted=keys.pinned())
    with pytest.raises(UsageError, match="1 to 1000 characters"):
        adopt(path, why=" ", trusted=keys.pinned())
    mine, _ = adopt(path, why="the machine was replaced", trusted=keys.pinned())
    assert {name: mine[name] for name in ("code", "environment", "corpora")} == {
        name: plan[name] for name in ("code", "environment", "corpora")
    }
    assert mine["deviates"]["plan_sha256"] == plan_digest(elsewhere(plan))
    assert mine["warnings"][-1].endswith("Why: the machine was replaced")
    assert parse_plan(canonical.dumps(mine), name="plan") == mine
    envelope = json.loads(path.read_bytes())
    envelope["signatures"] = []
    path.write_bytes(canonical.dumps(envelope))
    with pytest.raises(InvalidError, match="nobody signed it"):
        adopt(path, why=None, trusted=keys.pinned())
    path.write_bytes(b"junk")
    with pytest.raises(MalformedError):
        adopt(path, why=None, trusted=keys.pinned())
    with pytest.raises(UsageError, match="cannot read the plan"):
        adopt(tmp_path / "none", why=None, trusted=keys.pinned())


def test_another_text_is_another_plan(plan, tmp_path):
    path = tmp_path / "plan.dsse.json"
    name = next(iter(plan["corpora"]))
    path.write_bytes(sign_plan(plan | {"corpora": {name: "2" * 64}}, key=KEY, signed_at=TIME))
    with pytest.raises(UsageError, match=f"corpus {name} \\(expected 222222222222…"):
        adopt(path, why=None, trusted=keys.pinned())


def test_a_bundle_says_whether_its_plan_was_signed_before(plan):
    trusted = keys.pinned()

    def found(now: dict, before: dict | None) -> tuple[str, str] | None:
        files = {SIGNED_PLAN: sign_plan(before, key=KEY, signed_at=TIME)} if before else {}
        checks = [(check.status, check.detail) for check in check_signed(files, now, trusted=trusted)]
        return checks[0] if checks else None

    assert found(plan, None) is None
    status, detail = found(plan, plan)
    assert (status, "the plan is the one that was signed by" in detail) == ("pass", True)
    status, detail = found(plan | {"seeds": [7]}, plan)
    assert (status, "in more than it says" in detail) == ("fail", True)
    run = deviated(elsewhere(plan), plan, "why not")
    status, detail = found(run, elsewhere(plan))
    assert (status, "Why: why not" in detail, "torch" in detail) == ("pass", True, True)
    assert found(run, None)[0] == "fail"
    assert found(run | {"tolerance": {"loss": "9.0"}}, elsewhere(plan))[0] == "fail"
    assert found(run | {"warnings": []}, elsewhere(plan))[0] == "fail"


def test_a_deviation_hidden_in_the_statement_is_found(smoke_bundle):
    files = read_bundle(smoke_bundle)
    assert "plan" in failed(resealed(files, deviates={"why": "other"}))


def test_from_signing_to_the_bundle_on_the_command_line(key_file, tmp_path):
    """A plan signed, stamped, found not to fit, run with a deviation, bundled, verified."""
    path = tmp_path / "plan.dsse.json"
    done = repro("plan", "emoe", "--scale", "smoke", "--claims", "A1", "--seeds", "1", "--sign", key_file, "-o", path)
    assert done.returncode == 0, done.stderr.decode()
    done = repro("verify", path, "--offline", "--json", "--trusted-keys", f"{key_file}.pub.json")
    assert (json.loads(done.stdout)["kind"], json.loads(done.stdout)["state"]) == ("signed_plan", "trusted")

    plan = read_signed(path.read_bytes()).plan
    path.write_bytes(sign_plan(elsewhere(plan), key=KEY, signed_at=TIME))
    from opentimestamps.core.notary import PendingAttestation
    from timestamp_proofs import proof

    (tmp_path / "proof").write_bytes(proof(PendingAttestation("https://a.example"), data=path.read_bytes()))
    done = repro("timestamp", path, tmp_path / "proof")
    assert (done.returncode, b"pending: the calendar https://a.example" in done.stdout) == (0, True)

    run = tmp_path / "run"
    done = repro("run", "--plan", path, "--out", run)
    assert (done.returncode, b"not the plan's here: code" in done.stderr) == (2, True)
    assert not run.exists()
    done = repro("run", "--plan", path, "--out", run, "--deviate", "a newer checkout")
    assert done.returncode == 4, done.stderr.decode()
    assert b"warning: Deviates from the plan" in done.stderr
    assert "Why: a newer checkout" in (run / "report.html").read_text()
    bundle = tmp_path / "x.repro.zip"
    assert repro("bundle", run, "-o", bundle, "--key", key_file).returncode == 0
    done = repro("verify", bundle, "--offline", "-v")
    assert done.returncode == 0, done.stdout.decode()
    assert b"deviates from the plan that was signed" in done.stdout
    assert b"pending: the calendar" in done.stdout
    said = open_envelope(read_bundle(bundle)["statement.dsse.json"]).statement["predicate"]
    assert said["deviates"]["why"] == "a newer checkout"


def test_what_does_not_go_together():
    for words, message in (
        (("run",), b"expected either a paper or --plan"),
        (("run", "emoe", "--plan", "x"), b"expected either a paper or --plan"),
        (("run", "emoe", "--deviate", "x"), b"expected --plan FILE"),
        (("run", "--plan", "x", "--seeds", "3"), b"leave --seeds and --claims out"),
        (("plan", "emoe", "-o", "x"), b"expected both --sign KEY and -o FILE"),
    ):
        done = repro(*words)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr.decode()
