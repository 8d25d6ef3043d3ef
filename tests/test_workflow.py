"""The chain from plan to bundle on a real smoke run, and every tampering with it."""

import base64
import json
from pathlib import Path

import pytest
from command_line import repro

from records import canonical, keys
from records.errors import MalformedError
from records.inclusion import EVIDENCE_TREE, evidence_tree
from records.package import build_manifest, read_bundle
from records.replication import PUBLIC_KEY, build_replication
from records.statement import open_envelope
from repro.trace import genesis, link
from repro.workflow.bundle import make_bundle, verify
from repro.workflow.evidence import load
from repro.workflow.jobs import jobs
from repro.workflow.plan import parse_plan, plan_digest


@pytest.fixture
def bundle(smoke_bundle: Path) -> dict[str, bytes]:
    return read_bundle(smoke_bundle)


def checks(files: dict[str, bytes], *statuses: str) -> dict[str, set[str]]:
    """Codes of the checks by status."""
    found = verify(files, target="x", trusted=keys.pinned())
    return {status: {check.code for check in found.checks if check.status == status} for status in statuses}


def failed(files: dict[str, bytes]) -> set[str]:
    return checks(files, "fail")["fail"]


def resealed(files: dict[str, bytes], **changes) -> dict[str, bytes]:
    """What a forger with a key of his own makes of changed files: manifest, statement and signature made anew."""
    predicate = open_envelope(files["statement.dsse.json"]).statement["predicate"]
    del predicate["manifest_sha256"]
    predicate |= {
        "plan_sha256": canonical.sha256_hex(files["plan.json"]),
        "outcome_sha256": canonical.sha256_hex(files["outcome.json"]),
        EVIDENCE_TREE: evidence_tree(files),
        **changes,
    }
    plain = {k: v for k, v in files.items() if k not in ("manifest.json", "statement.dsse.json", PUBLIC_KEY)}
    return build_replication(
        plain,
        subject_name="arxiv:2509.21892",
        subject_sha256=canonical.sha256_hex(files["paper.json"]),
        predicate=predicate,
        key=keys.generate(),
    )


def a_trace(files: dict[str, bytes]) -> str:
    return next(name for name in sorted(files) if name.startswith("segments/") and name.endswith("trace.jsonl"))


def rechained(data: bytes, start: str, change) -> bytes:
    """A trace whose entries went through `change`, with every link made anew."""
    lines, head = [], start
    for line in data.splitlines():
        entry = change(json.loads(line)["entry"])
        if entry is not None:
            head = link(head, entry)
            lines.append(canonical.dumps({"chain": head, "entry": entry}) + b"\n")
    return b"".join(lines)


def test_an_honest_bundle_is_valid_and_its_own_key_gives_no_trust(bundle):
    found = verify(bundle, target="x", trusted=keys.pinned())
    assert (found.state, found.exit_code) == ("valid", 0)
    assert checks(bundle, "fail", "skip") == {"fail": set(), "skip": {"key_trust", "pith_number"}}
    passed = checks(bundle, "pass")["pass"]
    assert {"envelope_signature", "manifest", "plan", "evidence_tree", "trace", "verdicts"} <= passed
    assert found.trust.source == "document"


def test_a_bundle_is_trusted_with_the_users_key(smoke_bundle, key_file):
    done = repro("verify", smoke_bundle, "--offline", "--json", "--trusted-keys", f"{key_file}.pub.json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["state"], found["trust"]["source"]) == (0, "trusted", "file")
    assert found["kind"] == "replication_bundle"


def test_a_bundle_is_the_same_bytes_every_time(smoke_run, smoke_bundle, key_file, tmp_path):
    again = tmp_path / "again.zip"
    assert repro("bundle", smoke_run, "-o", again, "--key", key_file).returncode == 0
    assert again.read_bytes() == smoke_bundle.read_bytes()


def test_a_folder_verifies_as_its_zip_does(bundle, tmp_path):
    for name, data in bundle.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert repro("verify", tmp_path, "--offline").returncode == 0


def test_an_unsigned_bundle_is_valid_and_says_so(smoke_run):
    found = verify(make_bundle(smoke_run, key=None), target="x", trusted=keys.pinned())
    assert found.state == "valid"
    assert {"envelope_signature", "key_trust"} <= {check.code for check in found.checks if check.status == "skip"}


# Tampering by someone without the key: the manifest and the signature find it.


def test_every_file_is_bound(bundle):
    for name in bundle:
        changed = bundle | {name: bundle[name] + b" "}
        assert failed(changed), name


def test_one_byte_of_a_trace(bundle):
    name = a_trace(bundle)
    data = bytearray(bundle[name])
    data[len(data) // 2] ^= 1
    assert {"manifest", "trace"} <= failed(bundle | {name: bytes(data)})


def test_a_file_added_or_left_out(bundle):
    assert failed(bundle | {"extra.txt": b""}) == {"manifest"}
    fewer = dict(bundle)
    del fewer["report.html"]
    assert failed(fewer) == {"manifest"}


def test_a_plan_edited_after_the_run(bundle):
    plan = json.loads(bundle["plan.json"])
    plan["claims"][0]["passes"][0]["sigmas"] = "0.0"
    assert {"plan", "manifest", "trace"} <= failed(bundle | {"plan.json": canonical.dumps(plan)})


def test_a_statement_changed_under_its_signature(bundle):
    envelope = json.loads(bundle["statement.dsse.json"])
    statement = open_envelope(bundle["statement.dsse.json"]).statement
    statement["predicate"]["scale"] = "paper"
    envelope["payload"] = base64.b64encode(canonical.dumps(statement)).decode()
    assert "envelope_signature" in failed(bundle | {"statement.dsse.json": canonical.dumps(envelope)})


# Forgery by someone who signs anew with a key of his own: chains and judge find it.


def test_resealing_alone_changes_nothing(bundle):
    assert failed(resealed(bundle)) == set()


def test_tolerances_chosen_after_the_run(bundle):
    plan = json.loads(bundle["plan.json"])
    plan["claims"][0]["passes"][0]["sigmas"] = "0.0"
    assert "trace" in failed(resealed(bundle | {"plan.json": canonical.dumps(plan)}))


def test_a_fabricated_verdict(bundle):
    outcome = json.loads(bundle["outcome.json"])
    outcome["verdicts"][0] |= {"verdict": "replicated", "reason": "every pass criterion holds"}
    assert failed(resealed(bundle | {"outcome.json": canonical.dumps(outcome)})) == {"verdicts"}


def test_a_statement_that_says_more_than_the_outcome(bundle):
    predicate = open_envelope(bundle["statement.dsse.json"]).statement["predicate"]
    predicate["verdicts"][0]["verdict"] = "replicated"
    assert failed(resealed(bundle, verdicts=predicate["verdicts"])) == {"verdicts"}
    assert failed(resealed(bundle, scale="paper")) == {"plan"}
    assert failed(resealed(bundle, seeds=[0, 1, 2, 3, 4])) == {"plan"}
    assert failed(resealed(bundle, code=predicate["code"] | {"sha256": "0" * 64})) == {"plan"}


def test_a_fabricated_metric_needs_a_new_chain_and_then_another_verdict(bundle):
    name = next(n for n in sorted(bundle) if n.startswith("arms/topk-lr0.003/"))
    plain = bundle[name].replace(b'"value":"5.', b'"value":"4.')
    assert plain != bundle[name]
    assert failed(resealed(bundle | {name: plain})) == {"trace"}
    plan = parse_plan(bundle["plan.json"], name="plan")
    job = next(job for job in jobs(plan) if job.file == name)
    segment = job.segments[-1]
    trace = bundle[f"{segment.folder}/trace.jsonl"]
    head = json.loads(trace.splitlines()[-1])["chain"]

    def better(entry):
        return entry | {"value": "1.0"} if entry.get("name") == "loss/2k" else entry

    forged = rechained(bundle[name], genesis(head, job.digest), better)
    assert failed(resealed(bundle | {name: forged})) == {"verdicts"}


@pytest.mark.parametrize("value", ["nan", "1e400", "", "0x1", 3, None, "1" * 500])
def test_a_value_that_is_no_decimal_is_a_fault_and_no_crash(bundle, value):
    plan = parse_plan(bundle["plan.json"], name="plan")
    job = jobs(plan)[0]
    segment = job.segments[-1]
    name = f"{segment.folder}/trace.jsonl"
    start = genesis(plan_digest(plan), segment.digest)
    forged = rechained(bundle[name], start, lambda entry: entry | ({"loss": value} if "loss" in entry else {}))
    assert failed(resealed(bundle | {name: forged})) == {"trace"}
    head = json.loads(bundle[name].splitlines()[-1])["chain"]
    forged = rechained(
        bundle[job.file],
        genesis(head, job.digest),
        lambda entry: entry | ({"value": value} if "value" in entry else {}),
    )
    assert failed(resealed(bundle | {job.file: forged})) == {"trace"}


@pytest.mark.parametrize("timing", [b"junk", b"[1]", b'{"seconds":NaN}', b'{"seconds":-1}', b'{"seconds":"x"}'])
def test_measured_times_that_are_none_are_a_fault_and_no_crash(bundle, timing):
    name = a_trace(bundle).replace("trace", "timing")
    assert failed(resealed(bundle | {name: timing})) == {"trace"}


def test_a_trace_taken_from_another_arm(bundle):
    plan = parse_plan(bundle["plan.json"], name="plan")
    first, second = (f"{job.segments[-1].folder}/trace.jsonl" for job in jobs(plan)[:2])
    assert failed(resealed(bundle | {first: bundle[second]})) == {"trace"}


def test_fewer_steps_than_planned(bundle):
    plan = parse_plan(bundle["plan.json"], name="plan")
    job = jobs(plan)[0]
    name = f"{job.segments[-1].folder}/trace.jsonl"
    start = genesis(plan_digest(plan), job.segments[-1].digest)
    shorter = rechained(bundle[name], start, lambda entry: None if entry.get("step") == 10 else entry)
    found = verify(resealed(bundle | {name: shorter}), target="x", trusted=keys.pinned())
    assert "expected step 10" in " ".join(check.detail for check in found.checks if check.code == "trace")


def test_a_run_that_is_cut_short_is_never_a_pass(bundle):
    plan = parse_plan(bundle["plan.json"], name="plan")
    cut = {name: data for name, data in bundle.items() if "/topk-lr0.003/seed-1" not in name}
    loaded = load(plan, cut)
    assert (loaded.faults, loaded.missing) == ((), ("arms/topk-lr0.003/seed-1.jsonl",))
    assert failed(resealed(cut)) == {"verdicts"}


def test_a_stranger_among_the_evidence(bundle):
    assert failed(resealed(bundle | {"arms/other/seed-0.jsonl": b""})) == {"trace"}


COUNTS = dict.fromkeys(("steps", "batch", "context", "trace_every", "hash_every"), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan | {"schema": "repro.plan/v9"}, "expected a plan of the form repro.plan/v1"),
        (lambda plan: plan | {"seeds": []}, "at least one seed"),
        (lambda plan: plan | {"seeds": [0, 0]}, "none twice"),
        (lambda plan: plan | {"corpora": {}}, "a corpus that the plan gives a digest of"),
        (lambda plan: plan | {"arms": [plan["arms"][0] | {"id": "../x"}]}, "arm ids of letters"),
        (lambda plan: plan | {"arms": [plan["arms"][0] | {"segments": []}]}, "has no segments"),
        (lambda plan: plan | {"arms": [plan["arms"][0] | {"segments": [{"train": 3}]}]}, "all positive"),
        (
            lambda plan: plan | {"arms": [plan["arms"][0] | {"segments": [{"train": COUNTS, "corpus": []}]}]},
            "a corpus that",
        ),
        (lambda plan: {k: v for k, v in plan.items() if k != "tolerance"}, "missing fields"),
        (lambda plan: plan | {"code": {}}, "code's digest"),
        (lambda plan: [plan], "found list"),
    ],
)
def test_a_foreign_plan_that_is_none_is_malformed(bundle, change, message):
    plan = change(json.loads(bundle["plan.json"]))
    with pytest.raises(MalformedError, match=message):
        parse_plan(canonical.dumps(plan), name="plan.json")
    other_version = isinstance(plan, dict) and plan["schema"] != "repro.plan/v1"
    assert ("schema" if other_version else "plan") in failed(resealed(bundle | {"plan.json": canonical.dumps(plan)}))


def test_a_plan_that_is_not_canonical_is_malformed(bundle):
    with pytest.raises(MalformedError, match="canonical JSON"):
        parse_plan(json.dumps(json.loads(bundle["plan.json"]), indent=1).encode(), name="plan.json")


def test_a_manifest_lists_every_file(bundle):
    listed = json.loads(bundle["manifest.json"])["files"]
    assert set(listed) == set(bundle) - {"manifest.json", "statement.dsse.json"}
    assert build_manifest(bundle) == bundle["manifest.json"]
    crate = {item["@id"]: item for item in json.loads(bundle["ro-crate-metadata.json"])["@graph"]}
    assert {part["@id"] for part in crate["./"]["hasPart"]} == set(bundle) - {"ro-crate-metadata.json"}
    action, code = crate["#run"], json.loads(bundle["run.json"])["code"]
    assert (action["@type"], action["object"]) == ("CreateAction", {"@id": "plan.json"})
    assert {part["@id"] for part in action["result"]} >= {"outcome.json", "report.html", "run.json"}
    assert code["sha256"] in action["instrument"]["@id"]
    assert crate[action["instrument"]["@id"]]["softwareVersion"].startswith(f"{code['version']}+{code['commit']}")
    assert all(part["@id"] in crate for part in (*action["result"], *crate["./"]["hasPart"]))
