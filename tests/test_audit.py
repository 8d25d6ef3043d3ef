"""Audit by execution: an honest bundle agrees bit for bit; forgeries that verify do not; stretches cost their part.

The smoke run's own directory serves as the second execution wherever what is tested is the comparison, not the training.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command_line import repro
from test_workflow import rechained, resealed

from records import canonical, keys
from records.audit import read_audit, sign_audit
from records.errors import IndeterminateError
from records.package import MANIFEST, read_bundle, write_bundle
from repro.judge import judge
from repro.trace import genesis
from repro.workflow import audit
from repro.workflow.bundle import summary, verify
from repro.workflow.evidence import load, read_directory
from repro.workflow.jobs import ArmJob, jobs, stops, stretches
from repro.workflow.plan import parse_plan, plan_digest
from repro.workflow.run import execute_jobs


@pytest.fixture(scope="module")
def bundle(smoke_bundle: Path) -> dict[str, bytes]:
    return read_bundle(smoke_bundle)


@pytest.fixture(scope="module")
def plan(bundle: dict[str, bytes]) -> dict[str, Any]:
    return parse_plan(bundle["plan.json"], name="plan")


@dataclass
class Silent:
    """Hears what a run reports."""

    tasks: int = 0

    def begin(self, *, tokens: int, done: int, tasks: int) -> None:
        self.tasks = tasks

    def started(self, task: str, tokens: int) -> None: ...
    def advanced(self, task: str, tokens: int) -> None: ...
    def finished(self, task: str, seconds: float) -> None: ...


def everything(plan: dict[str, Any]) -> audit.Drawn:
    return audit.draw(plan, arms=10**6, segments=10**6, seed=0)


# Forgeries: made by somebody with a key of his own, who makes every chain, verdict, manifest and signature anew.


def entries_of(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line)["entry"] for line in data.splitlines()]


def forged(bundle: dict[str, bytes], change: Callable[[ArmJob, str, list[dict[str, Any]]], list[dict[str, Any]]]):
    """The bundle with `change` applied to the entries of every trace and every file of measures, and sealed anew."""
    files = dict(bundle)
    plan = parse_plan(files["plan.json"], name="plan")
    for job in jobs(plan):
        head = ""
        for name, start in [(f"{s.folder}/trace.jsonl", s.digest) for s in job.segments] + [(job.file, job.digest)]:
            begin = genesis(head if name == job.file else plan_digest(plan), start)
            files[name] = chain(change(job, name, entries_of(bundle[name])), begin)
            head = json.loads(files[name].splitlines()[-1])["chain"]
    outcome = {"plan_sha256": plan_digest(plan)} | judge(plan, load(plan, files).evidence)
    return resealed(files | {"outcome.json": canonical.dumps(outcome)}, verdicts=summary(outcome))


def chain(entries: list[dict[str, Any]], start: str) -> bytes:
    blank = b"".join(canonical.dumps({"chain": "", "entry": entry}) + b"\n" for entry in entries)
    return rechained(blank, start, lambda entry: entry)


def scaled(by: float):
    def change(_: ArmJob, __: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [e | ({"loss": f"{float(e['loss']) * by:.12f}"} if "loss" in e else {}) for e in entries]

    return change


def faked_measure(_: ArmJob, __: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [e | ({"value": f"{float(e['value']) - 0.5:.6f}"} if "value" in e else {}) for e in entries]


def faked_weights(_: ArmJob, __: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [e | ({"weights": "0" * 64} if e["type"] == "end" and "weights" in e else {}) for e in entries]


def taken_from(bundle: dict[str, bytes], choose: Callable[[ArmJob], tuple[str, int]]):
    """Every file is that of another arm or seed."""
    plan = parse_plan(bundle["plan.json"], name="plan")
    by = {(job.arm, job.seed): job for job in jobs(plan)}

    def change(job: ArmJob, name: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        other = by[choose(job)]
        if name == job.file:
            return entries_of(bundle[other.file])
        return entries_of(bundle[f"{other.segments[-1].folder}/trace.jsonl"])

    return change


@pytest.fixture(scope="module")
def longer(plan: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Evidence of one arm that was really trained for twice the planned steps, passed off as the plan's."""
    arm = plan["arms"][0]
    segment = arm["segments"][0]
    train = segment["train"] | {name: 2 * segment["train"][name] for name in ("steps", "trace_every", "hash_every")}
    train |= {"checkpoint_every": train["hash_every"]}
    twice = plan | {"arms": [arm | {"segments": [segment | {"train": train}]}], "seeds": plan["seeds"][:1]}
    folder = tmp_path_factory.mktemp("longer")
    (job,) = jobs(twice)
    execute_jobs(twice, folder, [job], workers=1, reporter=Silent())
    found = read_directory(folder)
    trace = entries_of(found[f"{job.segments[0].folder}/trace.jsonl"])
    halved = [e | {name: e[name] // 2 for name in ("step", "tokens", "steps") if name in e} for e in trace]
    return {"trace": halved, "measures": entries_of(found[job.file])}


def verdict(bundle: dict[str, bytes], plan: dict[str, Any], run: Path, *, exact: bool) -> set[str]:
    """Agreements of all arms and stretches of a bundle with the honest run."""
    return {item.agreement for item in audit.compare(plan, everything(plan), bundle, run, exact=exact)}


def test_an_honest_bundle_agrees_in_every_arm_and_stretch(bundle, plan, smoke_run):
    for exact in (True, False):
        found = audit.compare(plan, everything(plan), bundle, smoke_run, exact=exact)
        assert {item.agreement for item in found} == {"bitwise"}
        assert len(found) == len(jobs(plan)) + len(stretches(plan))
        assert all(item.lines > 0 and item.difference == 0 for item in found)


FORGERIES = {
    # what is forged: (the change, does the audit find it bit for bit, and where the environment differs)
    "a faked loss": (lambda bundle, longer: scaled(0.9), True, True),
    "a faked measure": (lambda bundle, longer: faked_measure, True, True),
    "a trace rescaled by 1e-4": (lambda bundle, longer: scaled(1.0001), True, False),
    "other weights": (lambda bundle, longer: faked_weights, True, False),
    "a swapped seed": (lambda bundle, longer: taken_from(bundle, lambda job: (job.arm, 1 - job.seed)), True, True),
    "an arm copied from another": (
        lambda bundle, longer: taken_from(
            bundle, lambda job: (job.arm.replace("emoe-lr0.003-l0.001", "topk-lr0.003"), job.seed)
        ),
        True,
        True,
    ),
    "an arm trained longer": (
        lambda bundle, longer: (
            lambda job, name, entries: (
                (longer["measures"] if name == job.file else longer["trace"])
                if (job.arm, job.seed) == ("topk-lr0.003", 0)
                else entries
            )
        ),
        True,
        True,
    ),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forgery_that_verifies_is_found_by_execution(bundle, plan, smoke_run, longer, what):
    """docs/replication-record.md, section 10, has this table."""
    make, exactly, roughly = FORGERIES[what]
    bad = forged(bundle, make(bundle, longer))
    found = verify(bad, target=what, trusted=keys.pinned())
    assert [check.detail for check in found.checks if check.status == "fail"] == []
    assert ("differs" in verdict(bad, plan, smoke_run, exact=True)) is exactly
    assert ("differs" in verdict(bad, plan, smoke_run, exact=False)) is roughly


def test_what_verifying_alone_finds(bundle, plan):
    """A trace passed off for two seeds, and one that goes on past the plan, need no execution."""
    copied = taken_from(bundle, lambda job: (job.arm, 0))
    files, job = dict(bundle), jobs(plan)[0]
    for other in jobs(plan):
        for segment in other.segments:
            name = f"{segment.folder}/trace.jsonl"
            files[name] = chain(copied(other, name, []), genesis(plan_digest(plan), segment.digest))
    faults = load(plan, files).faults
    assert any("the trace of seed 1 is that of seed 0: one was copied" in fault for fault in faults)

    name = f"{job.segments[0].folder}/trace.jsonl"
    entries = entries_of(bundle[name])
    more = [*entries[:-1], entries[-2] | {"step": entries[-2]["step"] + 10}, entries[-1]]
    files = bundle | {name: chain(more, genesis(plan_digest(plan), job.segments[0].digest))}
    assert any("as planned" in fault for fault in load(plan, files).faults)


# The comparison


def shifted(bundle: dict[str, bytes], folder: Path, name: str, start: str, change) -> Path:
    """The bundle's evidence in a folder, with one file's entries changed."""
    for file, data in bundle.items():
        if file.startswith(("segments/", "arms/")):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)
    (folder / name).write_bytes(rechained(bundle[name], start, change))
    return folder


@pytest.mark.parametrize(
    ("shift", "exact", "agreement"),
    [(0.01, False, "within_tolerance"), (0.01, True, "differs"), (0.5, False, "differs")],
)
def test_where_something_differs_the_tolerance_holds_and_is_named(bundle, plan, tmp_path, shift, exact, agreement):
    drawn = audit.draw(plan, arms=1, segments=0, seed=3)
    (job,) = drawn.arms
    segment = job.segments[-1]
    name, start = f"{segment.folder}/trace.jsonl", genesis(plan_digest(plan), segment.digest)

    def change(entry: dict[str, Any]) -> dict[str, Any]:
        return entry | ({"loss": str(float(entry["loss"]) + shift)} if "loss" in entry else {})

    folder = shifted(bundle, tmp_path, name, start, change)
    (found,) = audit.compare(plan, drawn, bundle, folder, exact=exact)
    assert (found.agreement, found.difference) == (agreement, pytest.approx(shift))
    # what no tolerance was declared for: a step's gradient norm, its weights, and measures that are no losses
    left = {name.partition("/")[0] for name in found.not_compared}
    assert left == ({"grad_norm", "weights", "flops"} if agreement == "within_tolerance" else set())


def test_a_metric_that_is_no_loss_is_named_and_never_measured_in_nats(bundle, plan, tmp_path):
    """Load shares and the like have no tolerance in the plan: where bits differ, they are said not to be compared."""
    drawn = audit.draw(plan, arms=1, segments=0, seed=3)
    (job,) = drawn.arms

    def with_load(value: str):
        lines = [*entries_of(bundle[job.file])[:-1], {"type": "metric", "name": "load/gini", "value": value}]
        return chain([*lines, {"type": "end", "metrics": len(lines)}], "00" * 32)

    changed = dict(bundle) | {job.file: with_load("0.9")}
    folder = shifted(bundle, tmp_path, job.file, "00" * 32, lambda entry: entry)
    (folder / job.file).write_bytes(with_load("0.1"))
    (found,) = audit.compare(plan, drawn, changed, folder, exact=False)
    assert (found.agreement, found.difference) == ("within_tolerance", 0.0)
    assert "load/gini" in found.not_compared
    (found,) = audit.compare(plan, drawn, changed, folder, exact=True)
    assert found.agreement == "differs"


def test_evidence_that_is_not_of_one_kind_differs_whatever_the_tolerance(bundle, plan, tmp_path):
    drawn = audit.draw(plan, arms=1, segments=0, seed=3)
    segment = drawn.arms[0].segments[-1]
    name, start = f"{segment.folder}/trace.jsonl", genesis(plan_digest(plan), segment.digest)
    folder = shifted(bundle, tmp_path, name, start, lambda entry: None if entry.get("step") == 10 else entry)
    (found,) = audit.compare(plan, drawn, bundle, folder, exact=False)
    assert (found.agreement, found.difference) == ("differs", float("inf"))
    (folder / name).unlink()
    (found,) = audit.compare(plan, drawn, bundle, folder, exact=False)
    assert found.agreement == "missing"


def test_what_differs_here_is_named(plan):
    changed = plan | {"environment": plan["environment"] | {"torch": "1.0"}, "code": {"sha256": "0" * 64}}
    assert audit.mismatches(changed, everything(plan)) == ["torch", "code"]
    with pytest.raises(IndeterminateError, match="different text cannot be compared"):
        audit.mismatches(plan | {"corpora": {"synthetic": "0" * 64}}, everything(plan))


# The draw, and stretches


def test_the_draw_is_the_auditors_and_repeats(plan):
    def names(seed: int) -> str:
        return str(audit.draw(plan, arms=4, segments=3, seed=seed))

    assert names(1) == names(1) != names(2)
    drawn = audit.draw(plan, arms=4, segments=3, seed=1)
    assert len({(job.arm, job.seed) for job in drawn.arms}) == 4
    assert len({stretch.key for stretch in drawn.stretches}) == 3
    assert len(everything(plan).arms) == len(jobs(plan))


def test_stretches_lie_between_committed_hashes_and_shared_segments_are_drawn_once(plan):
    first = plan["arms"][0]["segments"][0]
    long = first | {"train": first["train"] | {"steps": 50, "hash_every": 20, "trace_every": 10}}
    shared = plan | {"arms": [plan["arms"][0] | {"id": name, "segments": [long, first]} for name in ("a", "b")]}
    found = [(s.job.arm, s.job.seed, s.number, s.first, s.last) for s in stretches(shared)]
    steps = first["train"]["steps"]
    every = first["train"]["hash_every"]
    for seed in plan["seeds"]:
        assert found[:3] == [("a", 0, 0, 0, 20), ("a", 0, 0, 20, 40), ("a", 0, 0, 40, 50)]
        assert ("a", seed, 1, 0, min(every, steps)) in found
    assert not any(arm == "b" for arm, *_ in found)
    late = next(s for s in stretches(shared) if s.number == 1)
    assert [(s.config is long, steps) for _, s, steps in stops([], [late]).values()] == [(True, 50), (False, late.last)]
    early = stretches(shared)[1]
    assert [steps for _, _, steps in stops([], [early]).values()] == [40]
    assert [steps for _, _, steps in stops([early.job], [early]).values()] == [50, steps]


def test_a_stretch_is_trained_up_to_its_end_and_no_further(plan, tmp_path):
    """With a hash every ten steps, so that the smoke scale has stretches that end before their segment does."""
    arm = plan["arms"][0]
    segment = arm["segments"][0]
    train = segment["train"] | {"hash_every": 10, "trace_every": 10, "checkpoint_every": 10}
    fine = plan | {"arms": [arm | {"segments": [segment | {"train": train}]}], "seeds": [0]}
    (job,) = jobs(fine)
    whole, part = tmp_path / "whole", tmp_path / "part"
    execute_jobs(fine, whole, [job], workers=1, reporter=Silent())
    drawn = audit.Drawn(arms=(), stretches=stretches(fine)[:1], seed=0)
    heard = Silent()
    execute_jobs(fine, part, (), drawn=drawn.stretches, workers=1, reporter=heard)
    assert heard.tasks == 1
    trace = (part / job.segments[0].folder / "trace.jsonl").read_bytes()
    assert entries_of(trace)[-1]["step"] == 10
    assert not list(part.rglob("final.safetensors"))
    files = read_directory(whole)
    (found,) = audit.compare(fine, drawn, files, part, exact=True)
    assert (found.agreement, found.lines) == ("bitwise", 1)
    assert str(found) == f"{job.arm} seed 0 steps 1 to 10"
    assert audit.cost(fine, drawn, workers=1)[1] == pytest.approx(10 / train["steps"])
    begin = genesis(plan_digest(fine), job.segments[0].digest)
    name = f"{job.segments[0].folder}/trace.jsonl"
    for step, agreement in ((10, "differs"), (20, "bitwise")):
        forged = rechained(
            files[name], begin, lambda e, step=step: e | ({"loss": "1.0"} if e.get("step") == step else {})
        )
        (found,) = audit.compare(fine, drawn, files | {name: forged}, part, exact=True)
        assert found.agreement == agreement


# The statement


def statement(plan: dict[str, Any], bundle: dict[str, bytes], run: Path, drawn: audit.Drawn, asked: tuple[int, int]):
    audited = audit.compare(plan, drawn, bundle, run, exact=True)
    said = audit.predicate(
        plan, drawn, audited, files=bundle, folder=run, asked=asked, differing=[], finished_at="2026-11-22T00:00:00Z"
    )
    return sign_audit(said, manifest_sha256=canonical.sha256_hex(bundle[MANIFEST]), key=keys.private_key(bytes(32)))


def test_an_audit_is_of_this_bundle_and_of_what_its_seed_draws(bundle, plan, smoke_run):
    drawn = audit.draw(plan, arms=1, segments=2, seed=9)
    found = read_audit(statement(plan, bundle, smoke_run, drawn, (1, 2)))
    assert [check.status for check in audit.check_draw(plan, bundle, found)] == ["pass"]
    assert found.predicate["cost"]["run_seconds"] == found.predicate["cost"]["seconds"]  # the same folder, here
    picked = audit.draw(plan, arms=1, segments=2, seed=10)
    other = audit.Drawn(arms=picked.arms, stretches=picked.stretches, seed=9)
    (check,) = audit.check_draw(plan, bundle, read_audit(statement(plan, bundle, smoke_run, other, (1, 2))))
    assert (check.code, check.status) == ("draw", "fail")
    (check,) = audit.check_draw(plan, bundle | {MANIFEST: b"{}"}, found)
    assert (check.code, check.status) == ("manifest", "fail")


def test_on_the_command_line(smoke_bundle, bundle, key_file, tmp_path):
    """Draw, execute, sign; then verify and merge the statements beside the bundle."""
    path = tmp_path / "run.repro.zip"
    path.write_bytes(smoke_bundle.read_bytes())
    done = repro("audit", path, "--arms", "1", "--segments", "2", "--seed", "5", "--json", "--key", key_file)
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    assert (found["rule"], found["differing"]) == ("bitwise", [])
    assert [item["agreement"] for item in found["items"]] == ["bitwise"] * 3
    assert b"verified; draw 5: " in done.stderr
    assert b"% of the run" in done.stderr
    (said,) = tmp_path.glob("run.*-5.audit.json")
    done = repro("verify", path, said, "--offline", "--trusted-keys", f"{key_file}.pub.json")
    assert done.returncode == 0, done.stdout.decode()
    assert b"3 parts by 1 auditors" in done.stdout
    assert b"3 bitwise" in done.stdout
    done = repro("audit", path, "--merge", said, said, "--json")
    merged = json.loads(done.stdout)
    assert (done.returncode, len(merged["items"]), len(merged["auditors"])) == (0, 3, 1)

    forgery = tmp_path / "forged.zip"
    write_bundle(forgery, forged(bundle, scaled(1.0001)))
    done = repro("audit", forgery, "--seed", "1")
    assert done.returncode == 1, done.stderr.decode()
    assert b"differs" in done.stdout
    done = repro("audit", forgery, "--merge", said)
    assert done.returncode == 4
    assert b"speaks of another bundle" in done.stdout


def test_a_bundle_that_does_not_verify_is_not_executed(bundle, tmp_path):
    write_bundle(tmp_path / "bad.zip", bundle | {"extra": b""})
    done = repro("audit", tmp_path / "bad.zip")
    assert done.returncode == 1
    assert b"is in the bundle but not in the manifest" in done.stderr
    (tmp_path / "junk.zip").write_bytes(b"junk")
    assert repro("audit", tmp_path / "junk.zip").returncode == 3
    done = repro("audit", tmp_path / "junk.zip", "--arms", "-1")
    assert done.returncode == 2
