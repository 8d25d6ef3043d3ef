"""Arms as data: a stage of pre-training (PT) with E experts, the transition, a stage of continued pre-training (CPT).

- `Setting`: what a scale fixes for all arms; `Family`: E, mE and K of arms that are compared with each other
- `pretraining`, `continued`: the segments of the two stages; `at_once`: the transition with no training after it
- `line`: arms that differ only in how long their second stage is

Each stage ends with its own anneal, and every arm, grown or not, has the same two stages: the learning rate at a step is that
of every other arm with the same transition. A window of the corpus comes once an epoch, so the stages see disjoint text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from records.errors import UsageError
from repro.experiment import Arm
from repro.model import ModelConfig
from repro.moe.growth import Growth
from repro.train import Segment, TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """`few` experts that become `many`, `top_k` of them active."""

    few: int
    many: int
    top_k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a scale fixes for all arms.

    `model` is the grown one; `train.steps` are those of both stages, T, of which `train.decay` is the share of each stage that
    its anneal takes; `few` is E; `rewarm` the steps of warm-up after a transition; `probe` looks at the grown pool that often.
    `ks` are the K at which the transition is measured, with `k_pool` experts before it; `pools` the E of the sweep over E;
    `contest_steps` are T in the contest.
    """

    model: ModelConfig
    train: TrainConfig
    few: int
    rewarm: int
    corpus: str
    seeds: int
    eval_tokens: int
    probe: int
    ks: tuple[int, ...]
    k_pool: int
    pools: tuple[int, ...]
    contest_steps: int

    def __post_init__(self) -> None:
        many = self.model.num_experts
        if self.few >= many:
            raise UsageError(
                f"expert-upcycling: expected more than {self.few} experts after the transition, found {many}"
            )
        if max(self.ks) > self.k_pool or self.model.top_k > min(*self.pools, self.few):
            raise UsageError(
                f"expert-upcycling: expected top-k of at most the experts before the transition, found {max(self.ks)} of "
                f"{self.k_pool} and {self.model.top_k} of {min(*self.pools, self.few)}"
            )

    @property
    def half(self) -> int:
        """Steps of the first stage of all arms but those of the sweep over transitions: half of T."""
        return self.part(0.5)

    def part(self, share: float) -> int:
        """Steps that are `share` of T: a multiple of the steps of a trace entry, two of them at least."""
        every = self.train.trace_every
        return max(2, round(share * self.train.steps / every)) * every

    def anneal(self, steps: int) -> int:
        """Steps of the anneal at the end of a stage of `steps`."""
        every = self.train.trace_every
        return max(1, round(self.train.decay * steps / every)) * every

    def models(self, family: Family | None = None) -> tuple[ModelConfig, ModelConfig]:
        """The small and the large model of a family, by default that of all arms but those of the sweeps."""
        family = family or Family(few=self.few, many=self.model.num_experts, top_k=self.model.top_k)
        large = replace(self.model, num_experts=family.many, top_k=family.top_k)
        return replace(large, num_experts=family.few), large

    def arm(self, name: str, label: str, segments: Sequence[Segment], *, diagnose: bool = False) -> Arm:
        """The arm of `segments`, and what is measured at its end; `diagnose` asks for the twins too."""
        pool = " → ".join(map(str, dict.fromkeys(segment.model.num_experts for segment in segments)))
        steps = sum(segment.train.steps for segment in segments)
        return Arm(
            id=name,
            label=f"{name}: {label} ({pool} experts, {steps} steps)",
            segments=tuple(segments),
            measure={"tokens": self.eval_tokens, "diagnose": diagnose},
            measure_tokens=self.eval_tokens * (3 if diagnose else 1),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The transition: how the pool is grown (None: not at all, and the optimizer goes on), and the mechanism after it."""

    growth: Growth | None = None
    mechanism: Mapping[str, Any] = field(default_factory=dict)


def _cuts(setting: Setting, steps: int, marks: Sequence[int]) -> list[int]:
    """Where a stage of `steps` is cut: where its own anneal begins, and before it that of each of the `marks`."""
    stable = steps - setting.anneal(steps)
    return sorted({cut for mark in marks if 0 < (cut := mark - setting.anneal(mark)) < stable} | {stable})


def _stage(
    setting: Setting, model: ModelConfig, begin: int, steps: int, marks: Sequence[int], *, warmup: int, **changes: Any
) -> Iterator[Segment]:
    """A warm-up, the constant rate, an anneal to 0; `changes` are those of the segments, the first one's `first`."""
    first = changes.pop("first")
    probe = changes.pop("probe", 0)
    done = 0
    for cut in (*_cuts(setting, steps, marks), steps):
        train = replace(
            setting.train,
            steps=cut - done,
            first_step=begin + done,
            schedule="wsd" if cut == steps else "constant",
            decay=1.0 if cut == steps else 0.0,
            warmup=0 if done else min(cut, warmup),
            probe_every=probe,
        )
        kept = {"inherit": "all"} if done else first
        yield Segment(model=model, train=train, corpus=setting.corpus, **kept, **changes)
        done = cut


def pretraining(setting: Setting, model: ModelConfig, steps: int, marks: Sequence[int] = ()) -> list[Segment]:
    """The first stage; those of the same model share their segments up to where the anneal of the shorter begins."""
    stage = _stage(setting, model, 0, steps, marks, warmup=setting.train.warmup, first={"inherit": "nothing"})
    return list(stage)


def continued(
    setting: Setting, model: ModelConfig, begin: int, steps: int, step: Step, marks: Sequence[int] = ()
) -> list[Segment]:
    """The second stage, from the step `begin` on, after the transition `step`."""
    first = {"inherit": "weights", "growth": step.growth} if step.growth else {"inherit": "all"}
    probe = setting.probe if step.growth else 0
    stage = _stage(
        setting, model, begin, steps, marks, warmup=setting.rewarm, first=first, mechanism=step.mechanism, probe=probe
    )
    return list(stage)


def at_once(setting: Setting, before: Sequence[Segment], model: ModelConfig, growth: Growth) -> list[Segment]:
    """`before`, and a segment that grows the pool and does nothing else: one step at a learning rate of 0."""
    last = before[-1].train
    train = replace(
        setting.train, steps=1, first_step=last.first_step + last.steps, lr=0.0, warmup=0, schedule="constant", decay=0.0,
        bias_rate=0.0,
    )  # fmt: skip
    return [*before, Segment(model=model, train=train, corpus=setting.corpus, inherit="weights", growth=growth)]


def line(
    setting: Setting,
    name: str,
    label: str,
    before: Sequence[Segment],
    model: ModelConfig,
    ends: Mapping[str, int],
    step: Step,
    *,
    diagnose: bool = False,
) -> Iterator[Arm]:
    """Arms `name` + suffix whose second stage has the steps that `ends` gives by suffix; the longer share the shorter's."""
    begin = sum(segment.train.steps for segment in before)
    for suffix, steps in ends.items():
        segments = [*before, *continued(setting, model, begin, steps, step, tuple(ends.values()))]
        more = f", {suffix[1:]}% CPT" if suffix else ""
        yield setting.arm(f"{name}{suffix}", label + more, segments, diagnose=diagnose and not suffix)
