"""What each scale fixes: the two sizes, their compute and backbones, the recipe, the learning rates."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from papers.equal_resource.solver import Backbone
from repro.train import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One N and C in FLOPs, and what its MoEs share; `d_expert` is the granularity of the sweep.

    `dense` holds the settings of the search for the dense model (see `solver.dense_shape`).
    """

    parameters: int
    compute: float
    backbone: Backbone
    d_expert: int
    dense: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a scale fixes. Every arm runs all `learning_rates`, the one grid; `head` is a head's width.

    With `law` = True they are multiples of Step Law's learning rate for each arm. `rich` times C is spent by the `rich-` arms.
    """

    main: Size
    other: Size
    train: TrainConfig
    least_warmup: int
    warmup_share: float
    corpus: str
    seeds: int
    learning_rates: tuple[float, ...]
    eval_tokens: int
    head: int
    vocab: int = 256
    law: bool = False
    rate_tolerance: float = 0.03
    rich: float = 2.0
    first_seed: int = 0


def _size(parameters: int, compute: float, backbone: tuple[int, int, int], d_expert: int, **dense: Any) -> Size:
    d_model, layers, d_dense = backbone
    chain = Backbone(d_model=d_model, num_layers=layers, d_dense=d_dense)
    return Size(parameters=parameters, compute=compute, backbone=chain, d_expert=d_expert, dense=dense)


_TRAIN = TrainConfig(steps=1, batch=1, context=64, lr=1e-3, schedule="cosine", weight_decay=0.1, clip=1.0, balance=0.01)
_LARGE = replace(_TRAIN, context=2_048, precision="bfloat16", hash_every=1_000, checkpoint_every=1_000)
_2B = _size(2_152_556_032, 9.4e20, (1408, 16, 3904), 320)

SETTINGS = {
    "smoke": Setting(
        main=_size(76_500, 3.9e9, (16, 3, 44), 8, head=8, zeta=16.0),
        other=_size(47_500, 1.5e9, (12, 3, 32), 6, head=4, zeta=16.0),
        train=replace(_TRAIN, context=32, trace_every=5, hash_every=10, checkpoint_every=10),
        least_warmup=4, warmup_share=0.01, corpus="synthetic", seeds=2, head=4, eval_tokens=2_048,
        learning_rates=(0.01,), rich=4.0,
    ),
    "nano": Setting(
        main=_size(76_500, 2.7e11, (16, 3, 44), 8, head=8, zeta=16.0),
        other=_size(183_000, 1.5e12, (24, 3, 66), 12, head=8, zeta=16.0),
        train=_TRAIN,
        least_warmup=20, warmup_share=0.05, corpus="stdlib", seeds=3, head=8, eval_tokens=131_072, rich=3.7,
        first_seed=3, learning_rates=(0.008, 0.032),
    ),
    "small": Setting(
        main=_size(8_750_000, 2.5e15, (128, 8, 352), 16, head=32, zeta=32.0),
        other=_size(5_100_000, 8.5e14, (96, 8, 264), 24, head=32, zeta=32.0),
        train=replace(_TRAIN, context=512, precision="bfloat16"),
        least_warmup=100, warmup_share=0.01, corpus="installed", seeds=3, head=32, eval_tokens=1_048_576,
        learning_rates=(0.5, 1.0, 2.0), law=True, rich=1.5,
    ),
    "base": Setting(
        main=_2B, other=_size(3_250_000_000, 1.4e21, (1664, 18, 4608), 256),
        train=_LARGE, least_warmup=200, warmup_share=0.01, corpus="data:fineweb-edu-65536", seeds=3, head=128,
        eval_tokens=16_777_216, vocab=65_536, learning_rates=(1.0, 2.0), law=True,
    ),
    "paper": Setting(
        main=_size(6_517_444_608, 2.86e21, (2048, 24, 5464), 512), other=_2B, rate_tolerance=0.08,
        train=_LARGE, least_warmup=200, warmup_share=0.01, corpus="data:fineweb-edu-65536", seeds=3, head=128,
        eval_tokens=16_777_216, vocab=65_536, learning_rates=(1.0, 2.0), law=True,
    ),
}  # fmt: skip
