"""The training loop: deterministic, resumable bit for bit, and honest about divergence."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from records.errors import InvalidError, UsageError
from repro.checkpoint import load_final, weights_digest
from repro.data import corpus
from repro.data.batches import Batches
from repro.environment import set_deterministic
from repro.inherit import Parent
from repro.model import ModelConfig, Transformer
from repro.moe.growth import Growth
from repro.trace import check_chain, genesis
from repro.train import (
    Mechanism,
    Segment,
    TrainConfig,
    learning_rate,
    make_optimizer,
    train_segment,
)

START = genesis("11" * 32, "22" * 32)
SEGMENT = Segment(
    model=ModelConfig(d_model=16, num_layers=1, num_heads=2, context=16, d_expert=8, num_experts=4, top_k=2),
    train=TrainConfig(
        steps=40, batch=4, context=16, lr=1e-2, warmup=5, trace_every=5, hash_every=10, checkpoint_every=10
    ),
    corpus="synthetic",
)


def batches(segment: Segment = SEGMENT, seed: int = 0) -> Batches:
    text = corpus.load(segment.corpus)
    return Batches(data=text.train, batch=segment.train.batch, context=segment.train.context, seed=seed)


def train(
    folder: Path, segment: Segment = SEGMENT, seed: int = 0, mechanism: Mechanism | None = None, **more
) -> Transformer:
    set_deterministic()
    return train_segment(
        segment,
        batches=batches(segment, seed),
        mechanism=mechanism or Mechanism(),
        seed=seed,
        folder=folder,
        genesis=START,
        **more,
    )


def trace(folder: Path) -> list[dict]:
    return check_chain((folder / "trace.jsonl").read_bytes(), START)[0]


def test_the_loss_falls_towards_the_entropy_of_the_source(tmp_path):
    segment = replace(SEGMENT, train=replace(SEGMENT.train, steps=300, batch=16))
    train(tmp_path, segment)
    losses = [float(entry["loss"]) for entry in trace(tmp_path) if entry["type"] == "step"]
    floor = corpus.load("synthetic").entropy
    assert losses[0] > 4.5
    assert floor < losses[-1] < 3.2


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "trace.jsonl").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert (tmp_path / "a/final.safetensors").read_bytes() == (tmp_path / "b/final.safetensors").read_bytes()


def test_the_trace_says_what_was_trained(tmp_path):
    model = train(tmp_path)
    entries = trace(tmp_path)
    assert [entry["step"] for entry in entries[:-1]] == list(range(5, 41, 5))
    assert all(entry["tokens"] == entry["step"] * 4 * 16 for entry in entries[:-1])
    assert [entry["step"] for entry in entries[:-1] if "weights" in entry] == [10, 20, 30]
    assert entries[-1] == {"type": "end", "steps": 40, "weights": weights_digest(model)}
    timing = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert len(timing) == 8
    assert all(item["seconds"] > 0 for item in timing)
    assert all(item["cpu_seconds"] > 0 for item in timing)
    assert not (tmp_path / "checkpoint.safetensors").exists()


class _InterruptError(Exception):
    pass


@pytest.mark.parametrize("stop_at", [5, 10, 25, 40])
def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, stop_at):
    train(tmp_path / "whole")

    def stop(steps: int, tokens: int) -> None:
        if steps == stop_at:
            raise _InterruptError

    with pytest.raises(_InterruptError):
        train(tmp_path / "cut", progress=stop)
    assert (tmp_path / "cut/checkpoint.safetensors").exists() == (stop_at >= 10)
    train(tmp_path / "cut")
    for name in ("trace.jsonl", "final.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


KILLED = """
import sys
from pathlib import Path
from tests.test_train import LONG, train
train(Path(sys.argv[1]), LONG)
"""
LONG = replace(SEGMENT, train=replace(SEGMENT.train, steps=400, checkpoint_every=20, hash_every=100))


@pytest.mark.parametrize("lines", [1, 7, 33])
def test_kill_9_loses_nothing(tmp_path, lines):
    """A real process, killed once its trace has some lines, leaves a folder that goes on to the same weights."""
    train(tmp_path / "whole", LONG)
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "cut")], cwd=root, env=os.environ | {"PYTHONPATH": str(root)}
    )
    timing = tmp_path / "cut/timing.jsonl"
    deadline = time.monotonic() + 60
    while not (timing.exists() and timing.read_bytes().count(b"\n") >= lines) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train(tmp_path / "cut", LONG)
    for name in ("trace.jsonl", "final.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_checkpoint_of_another_plan_is_refused(tmp_path):
    def stop(steps: int, tokens: int) -> None:
        if steps == 10:
            raise _InterruptError

    with pytest.raises(_InterruptError):
        train(tmp_path, progress=stop)
    with pytest.raises(InvalidError, match="belongs to another plan or segment"):
        train_segment(
            SEGMENT,
            batches=batches(),
            mechanism=Mechanism(),
            seed=0,
            folder=tmp_path,
            genesis=genesis("44" * 32, "22" * 32),
        )
    (tmp_path / "checkpoint.safetensors").write_bytes(b"junk")
    with pytest.raises(InvalidError, match="expected a safetensors checkpoint"):
        train(tmp_path)
    (tmp_path / "checkpoint.safetensors").unlink()
    (tmp_path / "checkpoint.safetensors").mkdir()
    with pytest.raises(UsageError, match="safetensors: Is a directory"):
        train(tmp_path)


def test_weights_that_are_not_the_traces_are_refused(tmp_path):
    train(tmp_path / "a")
    train(tmp_path / "b", seed=1)
    model, head = load_final(SEGMENT.model, tmp_path / "a", genesis=START)
    assert head == check_chain((tmp_path / "a/trace.jsonl").read_bytes(), START)[1]
    assert weights_digest(model) == trace(tmp_path / "a")[-1]["weights"]
    (tmp_path / "b/final.safetensors").replace(tmp_path / "a/final.safetensors")
    with pytest.raises(InvalidError, match="not those that the trace ends with"):
        load_final(SEGMENT.model, tmp_path / "a", genesis=START)


class _Look(Mechanism):
    """Measures the weights and their gradients, and keeps count of the calls."""

    def probe(self, model, output):
        weight = model.blocks[0].ffn.router_ED
        assert weight.grad is not None
        assert not torch.is_grad_enabled()
        return {"norm": float(weight.norm()), "rows": weight.norm(dim=1).tolist()}


def test_probes_see_the_live_model_and_change_nothing(tmp_path):
    segment = replace(SEGMENT, train=replace(SEGMENT.train, steps=37, probe_every=10))
    train(tmp_path / "without", replace(segment, train=replace(segment.train, probe_every=0)))
    model = train(tmp_path / "with", segment, mechanism=_Look())
    probes = [entry for entry in trace(tmp_path / "with") if entry["type"] == "probe"]
    assert [probe["step"] for probe in probes] == [0, 10, 20, 30, 36]
    for probe in probes:
        assert [sum(row) for row in probe["load"]] == [4 * 16 * 2]
        assert len(probe["values"]["norm"]) == 1
        assert len(probe["values"]["rows"]) == 4
    first = Transformer(segment.model)
    first.init_weights(0)
    assert float(probes[0]["values"]["norm"][0]) == float(first.blocks[0].ffn.router_ED.detach().norm())
    others = [entry for entry in trace(tmp_path / "with") if entry["type"] != "probe"]
    assert others == trace(tmp_path / "without")
    assert others[-1]["weights"] == weights_digest(model)


@pytest.mark.parametrize("stop_at", [10, 20, 25])
def test_a_stopped_run_goes_on_to_the_same_probes(tmp_path, stop_at):
    segment = replace(SEGMENT, train=replace(SEGMENT.train, probe_every=10))
    train(tmp_path / "whole", segment)

    def stop(steps: int, tokens: int) -> None:
        if steps == stop_at:
            raise _InterruptError

    with pytest.raises(_InterruptError):
        train(tmp_path / "cut", segment, progress=stop)
    train(tmp_path / "cut", segment)
    assert (tmp_path / "cut/trace.jsonl").read_bytes() == (tmp_path / "whole/trace.jsonl").read_bytes()


class _Unseen(Mechanism):
    def probe(self, model, output):
        return {"x": float("nan")}


def test_a_probe_that_is_not_finite_ends_the_segment(tmp_path):
    train(tmp_path, replace(SEGMENT, train=replace(SEGMENT.train, probe_every=10)), mechanism=_Unseen())
    assert [entry["type"] for entry in trace(tmp_path)] == ["diverged"]


class _Poison(Mechanism):
    def gradients(self, model):
        model.blocks[-1].ffn.router_ED.data.fill_(float("nan"))


def test_the_layer_that_saw_the_divergence_is_named(tmp_path):
    train(tmp_path, mechanism=_Poison())
    entries = trace(tmp_path)
    assert [(entry["type"], entry["steps"], entry["layer"]) for entry in entries] == [("diverged", 1, "blocks.0.ffn")]


class _Explode(Mechanism):
    def loss(self, output):
        return output.logits_BSV.sum() * float("inf")


def test_divergence_is_recorded_and_no_number_is_made_up(tmp_path):
    train(tmp_path, mechanism=_Explode())
    entries = trace(tmp_path)
    assert [entry["type"] for entry in entries] == ["diverged"]
    assert entries[0]["steps"] < 40


def test_an_inheriting_segment_goes_on_from_the_one_before(tmp_path):
    train(tmp_path / "first")
    for inherit, same in (("weights", True), ("all", True), ("nothing", False)):
        segment = replace(SEGMENT, inherit=inherit, train=replace(SEGMENT.train, lr=0.0, warmup=0))
        model = train(
            tmp_path / inherit, segment, parent=Parent(folder=tmp_path / "first", model=SEGMENT.model, genesis=START)
        )
        first = load_final(SEGMENT.model, tmp_path / "first", genesis=START)[0]
        assert (weights_digest(model) == weights_digest(first)) is same
    with pytest.raises(UsageError, match="needs one before it"):
        train(tmp_path / "orphan", replace(SEGMENT, inherit="weights"))


def test_inheriting_all_keeps_the_optimizer_and_weights_alone_reset_it(tmp_path):
    train(tmp_path / "first")
    for inherit in ("weights", "all"):
        train(
            tmp_path / inherit,
            replace(SEGMENT, inherit=inherit),
            parent=Parent(folder=tmp_path / "first", model=SEGMENT.model, genesis=START),
        )
    traces = [(tmp_path / name / "trace.jsonl").read_bytes() for name in ("weights", "all")]
    assert traces[0] != traces[1]


def test_schedules():
    wsd = TrainConfig(steps=100, batch=1, context=1, lr=1.0, warmup=10, decay=0.2, final_lr=0.1)
    rates = [learning_rate(wsd, step) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == rates[80] == 1.0
    assert rates[90] == pytest.approx(0.1 + 0.9 / 2)
    assert rates[99] == pytest.approx(0.1 + 0.9 / 20)
    cosine = replace(wsd, schedule="cosine")
    assert learning_rate(cosine, 10) == 1.0
    assert learning_rate(cosine, 55) == pytest.approx(0.55)
    assert learning_rate(replace(wsd, schedule="constant"), 99) == 1.0
    assert all(a >= b for a, b in pairwise(rates[10:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1"),
        ({"warmup": 41}, "expected warmup within 40 steps"),
        ({"hash_every": 7}, "multiples of trace_every"),
        ({"probe_every": 7}, "0 or a multiple of trace_every = 5, found 7"),
        ({"betas": (0.9,)}, "betas: expected 2 numbers"),
    ],
)
def test_an_impossible_training_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SEGMENT.train, **change)


def test_adamw_decays_matrices_and_leaves_gains_alone():
    model = Transformer(SEGMENT.model)
    decayed, kept = (group["params"] for group in make_optimizer(model, SEGMENT.train).param_groups)
    assert {id(p) for p in decayed + kept} == {id(p) for p in model.parameters()}
    assert all(p.ndim >= 2 for p in decayed)
    assert kept
    assert all(p.ndim == 1 for p in kept)


def test_the_weights_digest_sees_every_bit(tmp_path):
    model = Transformer(SEGMENT.model)
    before = weights_digest(model)
    with torch.no_grad():
        model.embedding_VD.view(-1)[0] = torch.nextafter(model.embedding_VD.view(-1)[0], torch.tensor(9.0))
    assert weights_digest(model) != before


def test_golden_weights():
    """A refactor leaves these as they were; a change of computation says so in the changelog.

    Only the initial weights: those after training hold for one numeric environment alone.
    """
    model = Transformer(SEGMENT.model)
    model.init_weights(0)
    assert weights_digest(model) == "7995d6c7239af117754bd9fdb6b1e16dc284cf44c4247977debe5246d599c65d"


GROWN = replace(
    SEGMENT,
    model=replace(SEGMENT.model, num_experts=8, selection_bias=True),
    train=replace(SEGMENT.train, steps=20, first_step=40, bias_rate=1e-3),
    inherit="weights",
    growth=Growth(bias_noise=1e-3),
)
SOURCE = replace(
    SEGMENT, model=replace(SEGMENT.model, selection_bias=True), train=replace(SEGMENT.train, bias_rate=1e-3)
)


@pytest.mark.parametrize("inherit", ["weights", "all"])
@pytest.mark.parametrize("allocation", ["uniform", "utility"])
def test_a_segment_grows_the_pool_it_inherits_and_resumes_bit_for_bit(tmp_path, inherit, allocation):
    train(tmp_path / "source", SOURCE)
    parent = Parent(folder=tmp_path / "source", model=SOURCE.model, genesis=START)
    segment = replace(GROWN, inherit=inherit, growth=replace(GROWN.growth, allocation=allocation))
    model = train(tmp_path / "whole", segment, parent=parent)
    assert model.blocks[0].ffn.w_up_EDF.shape[0] == 8

    def stop(steps: int, tokens: int) -> None:
        if steps == 15:
            raise _InterruptError

    with pytest.raises(_InterruptError):
        train(tmp_path / "cut", segment, parent=parent, progress=stop)
    train(tmp_path / "cut", segment, parent=parent)
    for name in ("trace.jsonl", "final.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_grown_model_knows_where_its_experts_come_from_also_when_loaded(tmp_path):
    train(tmp_path / "source", SOURCE)
    parent = Parent(folder=tmp_path / "source", model=SOURCE.model, genesis=START)
    train(tmp_path / "grown", GROWN, parent=parent)
    loaded = load_final(GROWN.model, tmp_path / "grown", genesis=START)[0]
    assert {name: lineage_E.tolist() for name, lineage_E in loaded.lineages.items()} == {
        "blocks.0.ffn": [0, 1, 2, 3, 0, 1, 2, 3]
    }
    after = replace(SOURCE, model=GROWN.model, inherit="all", train=replace(SOURCE.train, first_step=60))
    again = train(tmp_path / "after", after, parent=Parent(folder=tmp_path / "grown", model=GROWN.model, genesis=START))
    assert again.lineages.keys() == loaded.lineages.keys()
    assert load_final(SOURCE.model, tmp_path / "source", genesis=START)[0].lineages == {}


class _Still(Mechanism):
    def gradients(self, model):
        for parameter in model.parameters():
            parameter.grad.zero_()


def test_a_mechanism_may_change_the_gradients(tmp_path):
    segment = replace(SEGMENT, train=replace(SEGMENT.train, weight_decay=0.0))
    model = train(tmp_path, segment, mechanism=_Still())
    fresh = Transformer(SEGMENT.model)
    fresh.init_weights(0)
    assert weights_digest(model) == weights_digest(fresh)


@pytest.mark.parametrize("growth", [None, Growth(bias_noise=1e-3)])
def test_a_parent_that_is_not_the_plans_is_refused(tmp_path, growth):
    """Another plan's folder, another model's weights under the right name, and a trace that ends in other weights."""
    train(tmp_path / "source", SOURCE)
    segment = GROWN if growth else replace(GROWN, growth=None, model=SOURCE.model)
    other = genesis("33" * 32, "22" * 32)
    with pytest.raises(InvalidError, match="the chain is broken"):
        train(tmp_path / "a", segment, parent=Parent(folder=tmp_path / "source", model=SOURCE.model, genesis=other))
    wide = replace(SOURCE.model, d_expert=16)
    with pytest.raises(
        InvalidError, match=r"of another model: expected blocks\.0\.ffn\.w_down_EFD of shape \(4, 16, 16\)"
    ):
        train(
            tmp_path / "b",
            replace(segment, model=replace(segment.model, d_expert=16)),
            parent=Parent(folder=tmp_path / "source", model=wide, genesis=START),
        )
    train(tmp_path / "twin", SOURCE, seed=1)
    (tmp_path / "twin" / "final.safetensors").replace(tmp_path / "source" / "final.safetensors")
    with pytest.raises(InvalidError, match="not those that the trace ends with"):
        train(tmp_path / "c", segment, parent=Parent(folder=tmp_path / "source", model=SOURCE.model, genesis=START))


def test_a_second_segment_sees_the_text_after_the_first(tmp_path):
    """Growing by nothing, with the optimizer kept, at a constant rate, is the run that was never cut in two."""
    constant = replace(SEGMENT.train, schedule="constant", warmup=0)
    train(tmp_path / "whole", replace(SEGMENT, train=constant))
    train(tmp_path / "first", replace(SEGMENT, train=replace(constant, steps=20)))
    second = replace(
        SEGMENT, train=replace(constant, steps=20, first_step=20), inherit="all", growth=Growth(allocation="utility")
    )
    parent = Parent(folder=tmp_path / "first", model=SEGMENT.model, genesis=START)
    model = train(tmp_path / "second", second, parent=parent)
    assert trace(tmp_path / "whole")[-1]["weights"] == weights_digest(model)


def test_loss_free_balancing_evens_the_load_out(tmp_path):
    """Without it, or a balance loss, a few experts take most tokens; with it the largest share comes down."""

    def largest_share(model: Transformer) -> float:
        tokens, _ = batches().at(1000)
        load_E = model(tokens).routers[0].routing.load_E.double()
        return float(load_E.max() / load_E.sum())

    plain = replace(SOURCE, train=replace(SOURCE.train, steps=200, balance=0.0, bias_rate=0.0))
    balanced = replace(plain, train=replace(plain.train, bias_rate=1e-2))
    shares = [largest_share(train(tmp_path / name, s)) for name, s in (("plain", plain), ("balanced", balanced))]
    assert shares[1] < shares[0]
    assert shares[1] < 0.4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"growth": Growth()}, "nothing to grow"),
        ({"train": replace(SEGMENT.train, bias_rate=1e-3)}, "expected a model with a selection bias"),
    ],
)
def test_an_impossible_segment_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SEGMENT, **change)
