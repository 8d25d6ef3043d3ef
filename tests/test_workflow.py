"""The chain from plan to bundle on a real smoke run, and every tampering with it."""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import ROOT, repro

from records import canonical, keys
from records.errors import InvalidError, MalformedError, UsageError
from records.inclusion import EVIDENCE_TREE, evidence_tree
from records.package import build_manifest, read_bundle
from records.replication import PUBLIC_KEY, build_replication
from records.statement import open_envelope
from repro.experiment import load_claims, select_claims
from repro.trace import genesis, link
from repro.workflow.bundle import make_bundle, verify
from repro.workflow.evidence import load, read_directory
from repro.workflow.jobs import jobs
from repro.workflow.plan import make_plan, parse_plan, plan_digest
from repro.workflow.run import finish, read_plan


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


# The plan


def test_the_plan_is_the_same_every_time_and_changes_with_what_decides_the_run():
    plan = make_plan("emoe", scale="smoke")
    assert plan_digest(plan) == plan_digest(make_plan("EMoE", scale="smoke"))
    assert plan_digest(plan) != plan_digest(make_plan("emoe", scale="smoke", seeds=3))
    assert plan_digest(plan) != plan_digest(make_plan("emoe", scale="smoke", claims="A1"))
    assert parse_plan(canonical.dumps(plan), name="plan") == plan


def test_claims_choose_the_arms_that_they_need():
    plan = make_plan("emoe", scale="smoke", claims="a1")
    assert [arm["id"] for arm in plan["arms"]] == ["topk-lr0.003", "control-lr0.003"]
    assert [claim["id"] for claim in plan["claims"]] == ["A1"]
    assert plan["claims_left_out"] == [claim.id for claim in load_claims("emoe").claim if claim.id != "A1"]
    assert len({job.segments[0].digest for job in jobs(plan)}) == 4


def test_a_claim_that_must_be_named_is_left_out_with_the_arms_that_only_it_needs(monkeypatch):
    info = load_claims("emoe")
    claims = tuple(
        replace(claim, only_named=("smoke",), suite="raw")
        if claim.id.endswith("-raw")
        else replace(claim, only_named=())
        for claim in info.claim
        if claim.id.removesuffix("-raw") in ("A1", "A2", "A3")
    )
    monkeypatch.setattr("repro.workflow.plan.load_claims", lambda _: replace(info, claim=claims))

    def arms(names: str | None, scale: str = "smoke") -> set[str]:
        return {arm["id"] for arm in make_plan("emoe", scale=scale, claims=names)["arms"]}

    plan = make_plan("emoe", scale="smoke")
    assert [claim["id"] for claim in plan["claims"]] == ["A1", "A2", "A3"]
    assert plan["claims_left_out"] == ["A1-raw", "A2-raw", "A3-raw"]
    raw = {name for name in arms("all") if "-raw" in name}
    assert raw
    assert arms(None) >= arms("all") - raw
    assert not arms(None) & raw
    assert arms("RAW") == arms("A1-raw,A2-raw,A3-raw") <= arms("all")
    assert arms(None, "nano") >= arms("all", "nano")
    with pytest.raises(UsageError, match="no claim is judged at smoke unless named: expected --claims with some of A1"):
        select_claims(replace(info, claim=claims[3:]), None, "smoke")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"paper": "bert", "scale": "smoke"}, "unknown paper 'bert'"),
        ({"paper": "emoe", "scale": "huge"}, "unknown scale 'huge'"),
        ({"paper": "emoe", "scale": "smoke", "seeds": 0}, "at least 1, found 0"),
        ({"paper": "emoe", "scale": "smoke", "claims": "Z9"}, "unknown claim 'z9'"),
        ({"paper": "emoe", "scale": "smoke", "device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_an_impossible_plan_is_said_clearly(arguments, message):
    with pytest.raises(UsageError, match=message):
        make_plan(arguments.pop("paper"), **arguments)


# The run directory


def copy_of(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns(".lock"))
    return to


def test_judging_again_gives_the_same_bytes(smoke_run, tmp_path):
    again = copy_of(smoke_run, tmp_path / "run")
    before = (again / "outcome.json").read_bytes()
    (again / "outcome.json").unlink()
    finish(read_plan(again), again)
    assert (again / "outcome.json").read_bytes() == before


def test_judging_refuses_evidence_that_does_not_hold(smoke_run, tmp_path):
    again = copy_of(smoke_run, tmp_path / "run")
    name = a_trace(read_directory(again))
    (again / name).write_bytes((again / name).read_bytes().replace(b'"loss":"5', b'"loss":"4'))
    with pytest.raises(InvalidError, match="the chain is broken"):
        finish(read_plan(again), again)
    assert repro("judge", again).returncode == 1


def test_a_bundle_wants_a_finished_and_judged_run(smoke_run, tmp_path):
    again = copy_of(smoke_run, tmp_path / "run")
    outcome = json.loads((again / "outcome.json").read_bytes())
    outcome["verdicts"][0]["verdict"] = "replicated"
    (again / "outcome.json").write_bytes(canonical.dumps(outcome))
    with pytest.raises(InvalidError, match="not what the judge makes of the evidence"):
        make_bundle(again, key=None)
    (again / "outcome.json").unlink()
    with pytest.raises(UsageError, match="make it with repro judge"):
        make_bundle(again, key=None)
    with pytest.raises(UsageError, match=r"expected plan\.json"):
        make_bundle(tmp_path / "nothing", key=None)


def test_code_that_changed_during_the_run_is_not_bundled(smoke_run, tmp_path):
    again = copy_of(smoke_run, tmp_path / "run")
    run = json.loads((again / "run.json").read_bytes())
    run["code"]["sha256"] = "0" * 64
    (again / "run.json").write_bytes(canonical.dumps(run))
    with pytest.raises(InvalidError, match="the code changed while the run went on"):
        make_bundle(again, key=None)


def test_a_finished_run_is_not_run_again(smoke_run, tmp_path):
    again = copy_of(smoke_run, tmp_path / "run")
    done = repro("run", "emoe", "--scale", "smoke", "--out", again)
    assert done.returncode == 2
    assert b"go on with --resume" in done.stderr
    done = repro("run", "emoe", "--scale", "smoke", "--out", again, "--resume")
    assert done.returncode == 4
    assert b"0 tasks left" in done.stderr
    done = repro("run", "emoe", "--scale", "smoke", "--out", again, "--resume", "--seeds", "3")
    assert done.returncode == 2
    assert b"holds a run of another plan" in done.stderr


def test_two_runs_in_one_directory(tmp_path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = repro("run", "emoe", "--scale", "smoke", "--out", tmp_path)
    assert done.returncode == 2
    assert b"in use by another run" in done.stderr


def _started(folder: Path, lines: int) -> subprocess.Popen:
    """A run of the command line, once some steps were traced."""
    process = subprocess.Popen(
        [sys.executable, "-m", "repro", "run", "emoe", "--scale", "smoke", "--out", str(folder), "--workers", "2"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(list(folder.glob("segments/*/final.safetensors"))) < lines:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on_to_the_same_evidence(smoke_run, tmp_path, how):
    folder = tmp_path / "run"
    process = _started(folder, 3)
    if how == signal.SIGKILL:
        process.send_signal(how)
    else:
        os.killpg(process.pid, how)  # as a terminal does: the workers get Ctrl-C too
    _, stderr = process.communicate(timeout=60)
    assert not (folder / "outcome.json").exists()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert b"--resume" in stderr
        assert b"Traceback" not in stderr
    for _ in range(100):  # the workers of a killed run end when they find nobody to report to
        done = repro("run", "emoe", "--scale", "smoke", "--out", folder, "--resume")
        if b"in use by another run" not in done.stderr:
            break
        time.sleep(0.1)
    assert done.returncode == 4, done.stderr.decode()

    def evidence(run: Path) -> dict[str, bytes]:
        return {name: data for name, data in read_directory(run).items() if not name.endswith("timing.jsonl")}

    assert evidence(folder) == evidence(smoke_run)
    assert (folder / "outcome.json").read_bytes() == (smoke_run / "outcome.json").read_bytes()


def test_a_worker_that_dies_is_said_and_recoverable(tmp_path):
    folder = tmp_path / "run"
    process = _started(folder, 2)

    def found(*words: str) -> list[str]:
        return subprocess.run(["pgrep", *words], capture_output=True, text=True).stdout.split()

    # Workers are the fork server's children; one that had just finished is missed by nobody, so the next one dies too.
    while process.poll() is None:
        if servers := found("-s", str(process.pid), "-f", "forkserver"):
            for pid in found("-P", ",".join(servers)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert b"go on with --resume" in stderr
    assert b"Traceback" not in stderr
    assert repro("run", "emoe", "--scale", "smoke", "--out", folder, "--resume").returncode == 4


def test_a_worker_whose_run_was_killed_ends_without_a_word():
    """Found by killing runs at random: it had nobody to tell of its trouble, and printed a traceback of that."""
    code = (
        "from multiprocessing import Pipe; from repro.workflow import worker; ours, theirs = Pipe(duplex=False); "
        "ours.close(); worker.main({}, 'x', 'arm', 0, None, 0, theirs)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert (done.returncode, done.stderr) == (1, b"")


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
