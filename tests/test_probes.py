"""Probes as evidence: what a verifier accepts of them, and every way in which they can be wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_train import SEGMENT
from test_workflow import rechained

from records import canonical
from records.errors import MalformedError
from repro.config import encode
from repro.data import corpus
from repro.data.batches import Batches
from repro.environment import set_deterministic
from repro.experiment import Design
from repro.trace import Probe, genesis
from repro.train import Mechanism, train_segment
from repro.workflow import audit
from repro.workflow import plan as plans
from repro.workflow.evidence import load
from repro.workflow.jobs import jobs
from repro.workflow.plan import make_plan, parse_plan, plan_digest

PROBED = replace(SEGMENT, train=replace(SEGMENT.train, steps=25, probe_every=10))


class Twice(Mechanism):
    def probe(self, model, output):
        return {"pair": [1.5, 2.0]}


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> tuple[dict, dict[str, bytes]]:
    """A plan of one arm with probes, and the files that training it gave."""
    plan = json.loads(canonical.dumps(make_plan("emoe", scale="smoke", seeds=1)))
    arm = {"id": "a", "label": "a", "segments": [encode(PROBED)], "measure": {}, "measure_tokens": 0}
    plan |= {"arms": [arm], "groups": [], "figures": []}
    (job,) = jobs(plan)
    folder: Path = tmp_path_factory.mktemp("probed")
    set_deterministic()
    train_segment(
        PROBED,
        batches=Batches(data=corpus.load("synthetic").train, batch=4, context=16, seed=0),
        mechanism=Twice(),
        seed=0,
        folder=folder,
        genesis=genesis(plan_digest(plan), job.segments[0].digest),
    )
    data = (folder / "trace.jsonl").read_bytes()
    return plan, {f"{job.segments[0].folder}/trace.jsonl": data, job.file: measures(job, data)}


def measures(job, data: bytes) -> bytes:
    """An arm that measures nothing."""
    start = genesis(json.loads(data.splitlines()[-1])["chain"], job.digest)
    return rechained(b'{"entry":{"type":"end","metrics":0}}', start, lambda entry: entry)


def changed(executed, change) -> dict[str, bytes]:
    """The files with every chain made anew around entries that went through `change`."""
    plan, files = executed
    (job,) = jobs(plan)
    name = f"{job.segments[0].folder}/trace.jsonl"
    data = rechained(files[name], genesis(plan_digest(plan), job.segments[0].digest), change)
    return {name: data, job.file: measures(job, data)}


def of_probe(at: int, **fields):
    return lambda entry: entry | fields if (entry["type"], entry.get("step")) == ("probe", at) else entry


def test_probes_are_evidence(executed):
    loaded = load(*executed)
    assert (loaded.faults, loaded.missing) == ((), ())
    (segment,) = loaded.probes["a", 0]
    assert [tokens for tokens, _ in segment] == [step * 4 * 16 for step in (0, 10, 20, 24)]
    for _, probe in segment:
        assert isinstance(probe, Probe)
        assert probe.values == {"pair": (1.5, 2.0)}
        assert [sum(row) for row in probe.load] == [4 * 16 * 2]
    assert load(executed[0], changed(executed, lambda entry: entry)).faults == ()


def without(step: int):
    return lambda entry: None if (entry["type"], entry.get("step")) == ("probe", step) else entry


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(10), "expected a probe of step 10"),
        (without(24), "expected 4 probes, found 3"),
        (of_probe(24, step=25), "expected a probe of step 24"),
        (of_probe(0, load=[[1, 2, 3]]), "the load of 4 experts in each of 1 layers"),
        (of_probe(0, load=[[1, 2, 3, -1]]), "the load of 4 experts"),
        (of_probe(0, load=[[1, 2, 3, True]]), "the load of 4 experts"),
        (of_probe(0, load=[]), "the load of 4 experts"),
        (of_probe(0, load=None), "the load of 4 experts"),
        (of_probe(0, values={"pair": "1.5"}), "lists of decimal strings"),
        (of_probe(0, values={"pair": ["nan"]}), "lists of decimal strings"),
        (of_probe(0, values=[]), "lists of decimal strings"),
    ],
)
def test_a_probe_that_is_not_the_plans_is_a_fault_and_no_crash(executed, change, message):
    faults = load(executed[0], changed(executed, change)).faults
    assert message in " ".join(faults)


def test_a_probe_out_of_its_place_and_one_that_nobody_asked_for(executed):
    early = changed(executed, lambda entry: None if (entry["type"], entry.get("step")) == ("step", 10) else entry)
    assert "a probe of step 10 after the steps before it" in " ".join(load(executed[0], early).faults)
    plan, files = executed
    bare = json.loads(canonical.dumps(plan))
    bare["arms"][0]["segments"][0]["train"]["probe_every"] = 0
    (job,), (before,) = jobs(bare), jobs(plan)
    start = genesis(plan_digest(bare), job.segments[0].digest)
    data = rechained(files[f"{before.segments[0].folder}/trace.jsonl"], start, lambda entry: entry)
    assert (
        "a probe that the plan does not ask for"
        in load(bare, {f"{job.segments[0].folder}/trace.jsonl": data}).faults[0]
    )


def test_an_audit_elsewhere_asks_for_the_same_form(executed, tmp_path):
    plan, files = executed
    drawn = audit.Drawn(arms=jobs(plan), stretches=[], seed=0)
    for change, agreement in (
        (of_probe(10, values={"pair": ["1.25", "2.0"]}), "within_tolerance"),
        (of_probe(10, values={"pair": ["1.5"]}), "differs"),
        (of_probe(10, load=[[1] * 5]), "differs"),
    ):
        for name, data in changed(executed, change).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
        (found,) = audit.compare(plan, drawn, files, tmp_path, exact=False)
        assert found.agreement == agreement
        (exact,) = audit.compare(plan, drawn, files, tmp_path, exact=True)
        assert exact.agreement == "differs"


@pytest.mark.parametrize("every", [-1, "10", 2.5, True])
def test_a_foreign_plan_with_impossible_probes_is_malformed(executed, every):
    plan = json.loads(canonical.dumps(executed[0]))
    plan["arms"][0]["segments"][0]["train"]["probe_every"] = str(every) if isinstance(every, float) else every
    with pytest.raises(MalformedError, match=r"positive train\.probe_every"):
        parse_plan(canonical.dumps(plan), name="plan.json")
    plan["arms"][0]["segments"][0]["train"]["probe_every"] = 10
    del plan["arms"][0]["segments"][0]["model"]["dense_layers"]
    with pytest.raises(MalformedError, match="dense_layers under model"):
        parse_plan(canonical.dumps(plan), name="plan.json")


def test_a_design_names_its_seeds(monkeypatch):
    module = plans.paper_module("emoe")
    smoke = module.design("smoke")

    class Later:
        mechanism, measure = module.mechanism, module.measure

        @staticmethod
        def design(scale: str) -> Design:
            return replace(smoke, first_seed=7)

    monkeypatch.setattr(plans, "paper_module", lambda slug: Later)
    assert make_plan("emoe", scale="smoke")["seeds"] == [7, 8]
    assert make_plan("emoe", scale="smoke", seeds=3)["seeds"] == [7, 8, 9]


def test_a_segment_that_just_goes_on_is_no_part_of_its_own(executed):
    plan, files = executed
    for change, parts in (({}, 1), ({"inherit": "weights"}, 2), ({"growth": {"experts": "copy"}}, 2)):
        two = json.loads(canonical.dumps(plan))
        first = two["arms"][0]["segments"][0]
        two["arms"][0]["segments"].append(first | {"inherit": "all"} | change)
        (job,) = jobs(two)
        (before,) = jobs(plan)
        trace = files[f"{before.segments[0].folder}/trace.jsonl"]
        made = {
            f"{segment.folder}/trace.jsonl": rechained(trace, genesis(plan_digest(two), segment.digest), lambda e: e)
            for segment in job.segments
        }
        made[job.file] = measures(job, made[f"{job.segments[1].folder}/trace.jsonl"])
        loaded = load(two, made)
        assert loaded.faults == ()
        losses = loaded.losses["a", 0]
        assert len(losses) == len(loaded.probes["a", 0]) == parts
        assert [tokens // 64 for part in losses for tokens, _ in part] == [*range(5, 51, 5)]


def test_measured_times_of_the_wall_and_of_the_work(executed):
    plan, files = executed
    (job,) = jobs(plan)
    name = f"{job.segments[0].folder}/timing.jsonl"
    groups = [
        {"step": 5, "seconds": 2.0, "cpu_seconds": 1.25},
        {"step": 10, "seconds": 9.0, "cpu_seconds": 1.0},  # and again, after a kill
        {"step": 10, "seconds": 1.0, "cpu_seconds": 1.0},
        *({"step": step, "seconds": 1.0, "cpu_seconds": 1.0} for step in (15, 20, 25)),
    ]
    timed = load(plan, files | {name: "\n".join(map(json.dumps, groups)).encode()})
    metrics = timed.evidence["a", 0].metrics
    assert (metrics["time/seconds"], metrics["time/work"]) == ("15.0", "6.25")
    assert [seconds for seconds, _ in timed.timed["a", 0][0]] == [2.0, 12.0, 13.0, 14.0, 15.0]
    assert [loss for _, loss in timed.timed["a", 0][0]] == [loss for _, loss in timed.losses["a", 0][0]]
    for group in groups:
        del group["cpu_seconds"]  # as a GPU's times are, and as they were in the first bundles
    bare = load(plan, files | {name: "\n".join(map(json.dumps, groups)).encode()})
    assert bare.evidence["a", 0].metrics["time/work"] == "15.0"
    assert "time/work" not in load(plan, files).evidence["a", 0].metrics
