"""What each scale fixes for MSSP: the models at the base widths, the widths, and how they are trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from records.errors import UsageError
from repro.data.corpus import RECORD_CLASSES, RECORD_INPUTS
from repro.model import ModelConfig
from repro.parameterization import Regime, Rule
from repro.train import TrainConfig

REGIMES: tuple[Regime, ...] = ("I", "II", "III")
GROWS: dict[Regime, tuple[str, ...]] = {
    "I": ("d_expert",),
    "II": ("num_experts", "top_k"),
    "III": ("d_expert", "num_experts", "top_k"),
}
CONTROLS: dict[Regime, tuple[Rule, ...]] = {"I": ("sp",), "II": ("tied", "sp"), "III": ("boosted",)}
SGD_CONTROL: dict[Regime, Rule] = {"I": "sp", "II": "mup", "III": "sp"}  # at the first learning rate
SWEPT: tuple[Rule, ...] = ("mup", "mssp", "sp")
AT = (2, 5)  # steps after which coordinates are taken, beside the start


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Learning rates for the transformer by width (`regime`) and by depth, and for the classifier by width if `mlp` has any.

    `sp_widths` are the widths whose rates are swept for SP (empty: all), `swept_layers` the depths whose rates are swept, with
    CompleteP alone (empty: all, and without it).
    `zero_readout` is `parameterize`'s, `reach` that of the claims' fits. A `suite` is that of the figures: with one, their
    arms are run where its claims are asked for, and not otherwise.
    """

    base: Mapping[Regime, ModelConfig]
    widths: tuple[int, ...]
    layers: tuple[int, ...]
    rates: tuple[int, ...]  # as powers of two
    train: TrainConfig
    corpus: str
    eval_tokens: int = 262_144
    sp_widths: tuple[int, ...] = ()
    swept_layers: tuple[int, ...] = ()
    mlp: Mapping[Regime, ModelConfig] = field(default_factory=dict)
    mlp_rates: tuple[int, ...] = ()
    mlp_train: TrainConfig | None = None
    zero_readout: bool | None = None
    reach: int = 1
    suite: str | None = None

    def widths_of(self, rule: Rule) -> tuple[int, ...]:
        """Widths whose rates are swept, times the base's of the transformer."""
        return (self.sp_widths if rule == "sp" else ()) or self.widths


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a scale fixes; models are those at the base width of each regime."""

    mlp: Mapping[Regime, ModelConfig]
    widths: Mapping[Regime, tuple[int, ...]]
    check: TrainConfig
    sgd: TrainConfig
    rates: tuple[int, ...]
    text: Mapping[Regime, ModelConfig]
    text_widths: tuple[int, ...]
    text_check: TrainConfig
    text_corpus: str
    seeds: int
    eval_tokens: int
    sweep: Sweep


def _mlp(width: int, *, d_expert: int, experts: int) -> ModelConfig:
    return ModelConfig(
        kind="mlp", vocab_size=RECORD_CLASSES, context=RECORD_INPUTS + 1, d_model=width, num_layers=1, num_heads=1,
        d_expert=d_expert, num_experts=experts, top_k=experts // 2,
    )  # fmt: skip


def _text(width: int, *, d_expert: int, experts: int, head: int, layers: int = 2, context: int = 64) -> ModelConfig:
    return ModelConfig(
        d_model=width, num_layers=layers, num_heads=width // head, context=context, d_expert=d_expert,
        num_experts=experts, top_k=experts // 2, qk_norm="head",
    )  # fmt: skip


def _pair(width: int, *, head: int, layers: int = 2, context: int = 64) -> dict[Regime, ModelConfig]:
    """The paper's shapes: II with M = N/4 experts of width 16, III with M = N/32 of width N/2; K = M/2."""
    return {
        "II": _text(width, d_expert=16, experts=width // 4, head=head, layers=layers, context=context),
        "III": _text(width, d_expert=width // 2, experts=width // 32, head=head, layers=layers, context=context),
    }


_MLP: dict[Regime, ModelConfig] = {
    "I": _mlp(64, d_expert=32, experts=8),
    "II": _mlp(64, d_expert=16, experts=16),
    "III": _mlp(64, d_expert=32, experts=8),
}
_CHECK = TrainConfig(
    steps=AT[-1], batch=128, context=RECORD_INPUTS + 1, lr=5e-3, schedule="constant", betas=(0.9, 0.999),
    weight_decay=0.0, clip=0.0, balance=0.0,
)  # fmt: skip
_SGD = replace(_CHECK, steps=200, optimizer="sgd", hash_every=100, checkpoint_every=100)
_SWEEP = TrainConfig(
    steps=600, batch=64, context=256, lr=1.0, warmup=60, decay=0.2, betas=(0.9, 0.95), weight_decay=0.1, balance=0.0
)
_MLP_SWEEP = replace(_CHECK, steps=200, trace_every=100, hash_every=200, checkpoint_every=200)

# At nano 4 experts of width 32 in III, not the paper's 2 of which one is active.
_NANO_SWEEP = Sweep(
    base={
        "II": _text(64, d_expert=16, experts=16, head=16),
        "III": _text(64, d_expert=32, experts=4, head=16),
    },
    widths=(64, 128, 256),
    layers=(4, 8, 16),
    rates=(-10, -9, -8, -7, -6, -5),
    train=replace(
        _SWEEP, steps=150, batch=8, context=64, warmup=15, trace_every=50, hash_every=150, checkpoint_every=150
    ),
    corpus="stdlib",
    eval_tokens=32_768,
    sp_widths=(64, 256),
    swept_layers=(4, 16),
    mlp={regime: _MLP[regime] for regime in ("II", "III")},
    mlp_rates=(-10, -9, -8, -7, -6, -5),
    mlp_train=_MLP_SWEEP,
    zero_readout=False,
    suite="sweep",
)

_NANO = Setting(
    mlp=_MLP,
    widths={"I": (64, 128, 256, 512), "II": (64, 128, 256, 512), "III": (64, 128, 256)},
    check=_CHECK,
    sgd=_SGD,
    rates=(-3, -2),
    text=_pair(64, head=16),
    text_widths=(64, 128, 256),
    text_check=replace(_CHECK, batch=16, context=64),
    text_corpus="stdlib",
    seeds=3,
    eval_tokens=2_048 * (RECORD_INPUTS + 1),
    sweep=_NANO_SWEEP,
)
SETTINGS = {
    "smoke": replace(
        _NANO,
        mlp={regime: replace(model, d_model=8, d_expert=4, num_experts=4, top_k=2) for regime, model in _MLP.items()},
        widths={"I": (8, 16, 32, 64), "II": (8, 16, 32, 64), "III": (8, 16, 32)},
        check=replace(_CHECK, batch=16),
        sgd=replace(_SGD, steps=4, batch=16),
        text={regime: _text(16, d_expert=8, experts=4, head=8, layers=1, context=16) for regime in _pair(64, head=16)},
        text_widths=(16, 32, 64),
        text_check=replace(_CHECK, batch=4, context=16),
        text_corpus="synthetic",
        seeds=2,
        eval_tokens=32 * (RECORD_INPUTS + 1),
        sweep=replace(
            _NANO_SWEEP,
            base={
                "II": _text(16, d_expert=4, experts=4, head=8, layers=1, context=16),
                "III": _text(16, d_expert=8, experts=4, head=8, layers=1, context=16),
            },
            widths=(16, 32, 64),
            train=replace(_NANO_SWEEP.train, steps=4, batch=4, context=16, warmup=1),
            corpus="synthetic",
            eval_tokens=1_024,
            sp_widths=(16, 64),
            mlp={
                regime: replace(_MLP[regime], d_model=8, d_expert=4, num_experts=4, top_k=2) for regime in ("II", "III")
            },
            mlp_train=replace(_MLP_SWEEP, steps=4, batch=16),
        ),
    ),
    "nano": _NANO,
    "small": replace(
        _NANO,
        sweep=Sweep(
            base=_pair(128, head=64, layers=4, context=256),
            widths=(128, 256, 512, 1024),
            layers=(4, 8, 16),
            rates=(-10, -9, -8, -7, -6, -5),
            train=_SWEEP,
            corpus="stdlib",
        ),
    ),
    "base": replace(
        _NANO,
        sweep=Sweep(
            base=_pair(256, head=64, layers=8, context=1024),
            widths=(256, 512, 1024),
            layers=(4, 8, 16),
            rates=(-10, -9, -8, -7, -6, -5),
            train=replace(_SWEEP, steps=4_768, batch=512, context=1024, warmup=477, precision="bfloat16"),
            corpus="installed",
        ),
    ),
    "paper": replace(
        _NANO,
        seeds=4,
        sweep=Sweep(
            base=_pair(256, head=64, layers=8, context=1024),
            widths=(256, 512, 1024, 2048),
            layers=(4, 8, 16),
            rates=(-11, -10, -9, -8, -7, -6, -5),
            train=replace(_SWEEP, steps=4_768, batch=512, context=1024, warmup=477, precision="bfloat16"),
            corpus="installed",
        ),
    ),
}


def grown(base: ModelConfig, regime: Regime, width: int) -> ModelConfig:
    """The base model at another width, its other sizes as the regime says."""
    if base.kind != "mlp" and width % base.head_width:
        raise UsageError(
            f"mssp: expected a width that is a multiple of the base's head size {base.head_width}, found {width}"
        )
    sizes = {name: getattr(base, name) * width // base.d_model for name in GROWS[regime]}
    heads = 1 if base.kind == "mlp" else base.num_heads * width // base.d_model
    return replace(base, d_model=width, num_heads=heads, **sizes)


def times(base: ModelConfig, width: int) -> str:
    """How an arm's name says its width: x4 for four times the base's, whatever that is at the scale."""
    return f"x{width // base.d_model}"
