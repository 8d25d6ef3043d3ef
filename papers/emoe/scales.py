"""What each scale fixes for all arms of EMoE: model, text, steps, what is measured.

- `Setting`: a scale; `scratch` is training from random weights, if any, `post` what follows on a pretrained model
- `SETTINGS`: smoke, nano, small, base, paper
"""

from dataclasses import dataclass

from repro.model import ModelConfig
from repro.pretrained import NOT_AT_HAND
from repro.train import TrainConfig

LAMBDAS = (0.001, 0.01)
"""λ of the hierarchical router loss that are tried beside 0; the first of them where the learning rate is tuned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scratch:
    """Training from random weights. λ = 0 is tried at the last of the learning rates, the control runs at the first."""

    train: TrainConfig
    corpus: str
    learning_rates: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """Training of a pretrained model on other text, with a fresh optimizer.

    It is a public `checkpoint`, given by its digest, or the model of the arm `topk` at the learning rate `pretrained_at`.
    The router is looked at on the first `calibrated` held-out windows, one token in `stride` at a time, and hindsight on
    the first `hindsight`. top-k and EMoE with λ = 0 are tried at all
    `learning_rates`; arms that vary one thing run at the last one, beside a twin that does not vary it.
    """

    train: TrainConfig
    corpus: str
    learning_rates: tuple[float, ...]
    pretrained_at: float = 0.0
    checkpoint: str | None = None
    calibrated: int
    stride: int
    hindsight: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A scale. `eval_tokens` are measured on for each metric, and as many to choose settings on."""

    model: ModelConfig
    scratch: Scratch | None
    post: Post
    seeds: int
    first_seed: int = 0
    k_ideal: int
    eval_tokens: int

    @property
    def ks(self) -> dict[str, int]:
        """The k' measured, by the multiple of k that they are."""
        k = self.model.top_k
        wanted = {"0.5k": k // 2, "1k": k, "1.5k": 3 * k // 2, "2k": 2 * k, "3k": 3 * k, "4k": 4 * k}
        return {name: k for name, k in wanted.items() if k <= self.model.num_experts}


# allenai/OLMoE-1B-7B-0924, whose config the checkpoint at hand replaces; it does not renormalise its gates.
_OLMOE = ModelConfig(
    vocab_size=50_304, d_model=2_048, d_expert=1_024, num_layers=16, num_heads=16, num_experts=64, top_k=8, context=1_024,
    renormalize=False, qk_norm="width",
)  # fmt: skip


def _instructions(steps: int) -> Post:
    """`steps` of 32 windows of instruction samples, tokenized with the checkpoint's own tokenizer."""
    return Post(
        train=TrainConfig(
            steps=steps, batch=32, context=1_024, lr=1e-5, schedule="cosine", warmup=steps // 20, weight_decay=0.0,
            precision="bfloat16", trace_every=5, hash_every=50, checkpoint_every=50,
        ),
        corpus="data:instructions", learning_rates=(5e-6, 1e-5), checkpoint=NOT_AT_HAND,
        calibrated=16, stride=8, hindsight=2,
    )  # fmt: skip


SETTINGS = {
    "smoke": Setting(
        model=ModelConfig(d_model=16, d_expert=8, num_layers=1, num_heads=2, num_experts=8, top_k=2, context=32),
        scratch=Scratch(
            train=TrainConfig(
                steps=20, batch=4, context=32, lr=3e-3, warmup=4, trace_every=5, hash_every=10, checkpoint_every=10
            ),
            corpus="synthetic", learning_rates=(3e-3,),
        ),
        post=Post(
            train=TrainConfig(
                steps=10, batch=4, context=32, lr=3e-3, warmup=2, trace_every=5, hash_every=10, checkpoint_every=10
            ),
            corpus="synthetic:1", learning_rates=(3e-3,), pretrained_at=3e-3, calibrated=4, stride=4, hindsight=2,
        ),
        seeds=2, k_ideal=8, eval_tokens=2_048,
    ),
    "nano": Setting(
        model=ModelConfig(d_model=64, d_expert=32, num_layers=2, num_heads=4, num_experts=16, top_k=2, context=128),
        scratch=Scratch(
            train=TrainConfig(steps=1_200, batch=8, context=128, lr=3e-3, warmup=40),
            corpus="stdlib",
            learning_rates=(3e-3, 6e-3),  # 1.5e-3 and 1.2e-2 lost in the pilot; see README.md
        ),
        post=Post(
            train=TrainConfig(steps=600, batch=8, context=128, lr=3e-3, warmup=20),
            corpus="stdlib:prose",
            learning_rates=(6e-3, 3e-3),  # 1.5e-3 lost in the pilot; see README.md
            pretrained_at=6e-3, calibrated=256, stride=4, hindsight=32,
        ),
        seeds=3, first_seed=3, k_ideal=8, eval_tokens=65_536,
    ),
    "small": Setting(
        model=ModelConfig(d_model=256, d_expert=128, num_layers=6, num_heads=8, num_experts=32, top_k=2, context=256),
        scratch=Scratch(
            train=TrainConfig(steps=4_000, batch=64, context=256, lr=1e-3, warmup=100, precision="bfloat16"),
            corpus="installed", learning_rates=(1e-3, 2e-3),
        ),
        post=Post(
            train=TrainConfig(steps=250, batch=64, context=256, lr=1e-3, warmup=20, hash_every=50, precision="bfloat16"),
            corpus="stdlib:prose", learning_rates=(5e-4, 1e-3), pretrained_at=1e-3,
            calibrated=128, stride=4, hindsight=16,
        ),
        seeds=3, k_ideal=8, eval_tokens=131_072,
    ),
    # The paper post-trains on 50K instruction samples, about 49M tokens; base takes a tenth of that.
    "base": Setting(
        model=_OLMOE, scratch=None, post=_instructions(150), seeds=3, k_ideal=32, eval_tokens=262_144,
    ),
    "paper": Setting(
        model=_OLMOE, scratch=None, post=_instructions(1_500), seeds=3, k_ideal=32, eval_tokens=1_048_576,
    ),
}  # fmt: skip
