"""What each scale fixes for all arms of EMO: model, training, stages, when the ablations grow.

- `Setting`: a scale; its schedule is checked when it is made
- `SETTINGS`: smoke, nano, small, base, paper
"""

import itertools
from dataclasses import dataclass, replace

from papers.emo import law
from records.errors import UsageError
from repro.model import ModelConfig
from repro.train import TrainConfig

STAGES = (8, 16, 32, 64, 128)
"""EMO's numbers of experts, stage by stage; `law.PRINTED_SHARES` are their shares of the tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A scale. `model` has the experts of the last stage, `train` all steps.

    `stages` are the numbers of experts and `shares` the shares of the tokens that EMO's printed ones come to. The arms that
    grow at one moment, 25, 50 or 75% of the tokens, go from the first to the second number of `jump`.
    `clock_stages` and `clock_steps`, if given, are what the time of growing is measured on in place of the arms themselves.
    """

    model: ModelConfig
    train: TrainConfig
    stages: tuple[int, ...]
    shares: tuple[float, ...]
    jump: tuple[int, int]
    rewarm: int
    corpus: str
    seeds: int
    first_seed: int = 0
    eval_tokens: int
    clock_stages: tuple[int, ...] = ()
    clock_steps: int = 0

    def __post_init__(self) -> None:
        law.check_shares(self.shares)
        for name, experts in (("stages", self.stages), ("jump", self.jump), ("clock_stages", self.clock_stages)):
            if any(a >= b for a, b in itertools.pairwise(experts)):
                raise UsageError(f"EMO's {name}: expected rising numbers of experts, found {experts}")
            if experts and not self.model.top_k <= experts[0]:
                raise UsageError(
                    f"EMO's {name}: expected at least top_k = {self.model.top_k} experts from the start, found {experts[0]}"
                )
        if len(self.stages) != len(self.shares):
            raise UsageError(
                f"EMO's schedule: expected a share for each of {len(self.stages)} stages, found {len(self.shares)}"
            )
        if self.stages[-1] != self.model.num_experts:
            raise UsageError(
                f"EMO's stages: expected the last to have the model's {self.model.num_experts} experts, found {self.stages[-1]}"
            )


TEXT = "file:text"
"""Where `base` and `paper` look for text of their size: a file or folder `text` where the run starts."""

_PAPER = Setting(
    model=ModelConfig(
        d_model=2048, d_expert=768, num_layers=16, num_heads=16, num_experts=128, top_k=8, context=8192, score="sigmoid",
        selection_bias=True, d_shared=768,
    ),
    train=TrainConfig(
        steps=240_000, batch=1024, context=8192, epochs=1, lr=9e-4, warmup=2_000, decay=0.1, weight_decay=0.05, bias_rate=1e-3,
        precision="bfloat16", trace_every=100, hash_every=10_000, checkpoint_every=2_000, probe_every=4_000,
    ),
    stages=STAGES, shares=law.printed(5), jump=(16, 32), rewarm=500, corpus=TEXT, seeds=3, eval_tokens=8_388_608,
)  # fmt: skip

SETTINGS = {
    "smoke": Setting(
        model=ModelConfig(
            d_model=16, d_expert=8, num_layers=1, num_heads=2, num_experts=16, top_k=2, context=32, score="sigmoid",
            selection_bias=True, d_shared=8,
        ),
        train=TrainConfig(
            steps=40, batch=4, context=32, lr=3e-3, warmup=2, decay=0.1, bias_rate=1e-3, trace_every=2, hash_every=10,
            checkpoint_every=10, probe_every=10,
        ),
        stages=(4, 8, 16), shares=law.printed(3), jump=(4, 16), rewarm=2, corpus="synthetic", seeds=2, eval_tokens=2_048,
    ),
    "nano": Setting(
        model=ModelConfig(
            d_model=64, d_expert=32, num_layers=2, num_heads=4, num_experts=16, top_k=2, context=128, score="sigmoid",
            selection_bias=True, d_shared=32,
        ),
        train=TrainConfig(
            steps=1_000, batch=8, context=128, lr=3e-3, warmup=40, decay=0.1, bias_rate=1e-3, probe_every=50
        ),
        stages=(4, 8, 16), shares=law.printed(3), jump=(4, 16), rewarm=20, corpus="stdlib", seeds=4, first_seed=3,
        eval_tokens=65_536, clock_stages=STAGES, clock_steps=200,
    ),
    "small": Setting(
        model=ModelConfig(
            d_model=512, d_expert=192, num_layers=8, num_heads=8, num_experts=128, top_k=8, context=512, score="sigmoid",
            selection_bias=True, d_shared=192,
        ),
        train=TrainConfig(
            steps=2_640, batch=32, context=512, epochs=4, lr=2e-3, warmup=100, decay=0.1, weight_decay=0.05, bias_rate=1e-3,
            precision="bfloat16", trace_every=20, hash_every=200, checkpoint_every=200, probe_every=100,
        ),
        stages=STAGES, shares=law.printed(5), jump=(16, 32), rewarm=20, corpus="stdlib", seeds=3, eval_tokens=524_288,
    ),
    "base": replace(
        _PAPER,
        model=replace(_PAPER.model, d_model=1024, d_expert=384, num_heads=8, context=2048, d_shared=384),
        train=replace(
            _PAPER.train, steps=4_000, batch=512, context=2048, lr=1.2e-3, warmup=200, trace_every=20, hash_every=1_000,
            checkpoint_every=200, probe_every=200,
        ),
        rewarm=20, eval_tokens=2_097_152,
    ),
    "paper": _PAPER,
}  # fmt: skip
