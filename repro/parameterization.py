"""How initialisation, learning rates, Adam's ε and gates follow a model's sizes: SP, muP and MSSP as tables of exponents.

- `Sizes`: the sizes that exponents are of; `Power`: a product of powers of them
- `table`: the rows of a rule, by regime and optimizer: what a reader holds against the paper
- `Scales`: a rule at given sizes, anchored at base sizes, for any model: `rescale` its weights, `groups` for its optimizer,
  `gate` and `residual` multipliers
- `parameterize`: the same, put into a `ModelConfig`, for the one training loop

Everything is anchored: at the base sizes every factor is 1, and a model is what its defaults make of it. Three
exceptions are no factors and hold at any size: a readout of zeros, the zero router of MSSP in regime I, and experts that
start as copies of one ("tied"), MSSP's rule in regime III.

Source: "How to Scale Mixture-of-Experts" (arXiv 2605.14200) and its authors' public code; for depth CompleteP with α = 1
(arXiv 2505.01618). Regimes: I, the width N grows with the experts' width F at fixed M experts, K of them active; II, N grows
with M and K at fixed F; III, all four grow together.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

import torch
from torch import nn

from records.errors import UsageError
from repro.model import ModelConfig, Weight

Rule = Literal["sp", "mup", "mssp", "tied", "boosted"]
Regime = Literal["I", "II", "III"]
Optimizer = Literal["adam", "sgd"]
Role = Literal["embedding", "attention", "dense", "gain", "router", "expert_up", "expert_down", "readout"]

ROLES: dict[str, Role] = {
    "embedding_VD": "embedding",
    "w_in_ID": "embedding",
    "w_qkv_DD": "attention",
    "w_out_DD": "attention",
    "w_up_DF": "dense",
    "w_down_FD": "dense",
    "gain_D": "gain",
    "router_ED": "router",
    "w_up_EDF": "expert_up",
    "w_down_EFD": "expert_down",
    "unembedding_VD": "readout",
}
"""Roles of this package's own weights, by the last part of their names."""

_WRITES_TO_STREAM = ("w_out_DD", "w_down_FD", "w_down_EFD")  # whose default std falls with depth
_HIDDEN = (
    "attention",
    "dense",
    "router",
    "expert_up",
    "expert_down",
    "gain",
)  # inside the blocks that depth multiplies


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Width N, expert width F, experts M, active experts K, layers L."""

    d_model: int
    d_expert: int
    num_experts: int
    top_k: int
    num_layers: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise UsageError(f"sizes: expected {field.name} of at least 1, found {getattr(self, field.name)}")
        if self.top_k > self.num_experts:
            raise UsageError(
                f"sizes: expected top_k of at most num_experts={self.num_experts}, found {self.top_k} (K > M)"
            )


@dataclass(frozen=True, slots=True)
class Power:
    """N^n · F^f · M^m · K^k · L^l; called with sizes and base sizes, the ratio of its values there: 1 at the base."""

    n: float = 0.0
    f: float = 0.0
    m: float = 0.0
    k: float = 0.0
    l: float = 0.0  # noqa: E741 (the symbols of the paper)

    def __call__(self, sizes: Sizes, base: Sizes) -> float:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(sizes), dataclasses.astuple(base), strict=True)
        return float(math.prod((size / anchor) ** exponent for exponent, size, anchor in pairs if exponent))

    def __mul__(self, other: "Power") -> "Power":
        return Power(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def inverse(self) -> "Power":
        """1 over this."""
        return Power(*(-exponent for exponent in dataclasses.astuple(self)))

    def __str__(self) -> str:
        parts = [
            symbol if exponent == 1 else f"{symbol}^{_exponent(exponent)}"
            for symbol, exponent in zip("NFMKL", dataclasses.astuple(self), strict=True)
            if exponent
        ]
        return "·".join(parts) or "1"


def _exponent(value: float) -> str:
    sign = "-" if value < 0 else ""
    return f"{sign}½" if abs(value) == 0.5 else f"{sign}{Fraction(abs(value))}"


ONE = Power()
N, F, M, K = Power(n=1), Power(f=1), Power(m=1), Power(k=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One role's line of the table. `std`: None for zero; for `attention` and `dense` fan_in^-½ whatever it says."""

    role: Role
    std: Power | None
    lr: Power
    eps: Power
    tied: bool = False


def table(rule: Rule, regime: Regime, optimizer: Optimizer, *, zero_readout: bool | None = None) -> tuple[Row, ...]:
    """Rows of `rule`; roles for which the optimizer has no column are left out.

    `tied` and `boosted` are muP with one of MSSP's two remedies in the regime where the other one belongs: the wrong
    fixes. By default the readout starts at zero, but for SP. MSSP differs from muP in the router's std in regime I, the
    experts' std in II and their tie in III.

    Raises:
        UsageError: an unknown rule, regime or optimizer.
    """
    for name, value, known in (("rule", rule, Rule), ("regime", regime, Regime), ("optimizer", optimizer, Optimizer)):
        if value not in get_args(known):
            raise UsageError(f"parameterization: expected a {name} of {', '.join(get_args(known))}, found {value!r}")
    if rule in ("tied", "boosted") and regime == "I":
        raise UsageError(f"parameterization: {rule} is a wrong fix of regimes II and III, found regime I")
    half_n, half_f = Power(n=-0.5), Power(f=-0.5)
    zero = rule != "sp" if zero_readout is None else zero_readout
    if rule == "sp":
        # the authors' code: every learning rate falls with the width, nothing else is scaled
        rows = [Row(role="embedding", std=ONE, lr=N.inverse(), eps=ONE)]
        hidden: tuple[Role, ...] = ("attention", "dense", "router", "expert_up")
        rows += [Row(role=role, std=half_n, lr=N.inverse(), eps=ONE) for role in hidden]
        rows += [
            Row(role="gain", std=ONE, lr=N.inverse(), eps=ONE),
            Row(role="expert_down", std=half_f, lr=N.inverse(), eps=ONE),
            Row(role="readout", std=None if zero else half_n, lr=N.inverse(), eps=ONE),
        ]
        return tuple(row for row in rows if optimizer == "adam" or row.role not in ("attention", "dense", "gain"))
    tied = rule == "tied" or (rule, regime) == ("mssp", "III")
    boosted = rule == "boosted" or (rule, regime) == ("mssp", "II")
    router: Power | None = half_n
    if regime == "I":
        router = None if rule == "mssp" else N.inverse()
    by_n, by_m = N.inverse(), M.inverse()
    adam_lr: dict[str, Power] = {
        "embedding": ONE, "gain": ONE, "attention": by_n, "dense": by_n, "router": by_n, "expert_up": by_n,
        "expert_down": F.inverse(), "readout": by_n,
    }  # fmt: skip
    m_over_n = M * by_n
    sgd_lr: dict[str, Power] = {
        "embedding": N,
        "router": {"I": by_n, "II": m_over_n, "III": ONE}[regime],
        "expert_up": {"I": ONE, "II": m_over_n, "III": M}[regime],
        "expert_down": {"I": ONE, "II": M * N, "III": M}[regime],
        "readout": by_n,
    }
    eps: dict[str, Power] = {
        "embedding": by_n, "gain": by_n, "attention": by_n, "dense": by_n,
        "router": {"I": ONE, "II": by_m, "III": by_m}[regime],
        "expert_up": {"I": by_n, "II": by_m, "III": by_n * by_m}[regime],
        "expert_down": {"I": by_n, "II": by_n * by_m, "III": by_n * by_m}[regime],
        "readout": ONE,
    }  # fmt: skip
    std: dict[str, Power | None] = {
        "embedding": ONE, "gain": ONE, "attention": half_n, "dense": half_n, "router": router, "expert_up": half_n,
        "expert_down": half_f * Power(m=0.5) if boosted else half_f,
        "readout": None if zero else by_n,
    }  # fmt: skip
    lr = adam_lr if optimizer == "adam" else sgd_lr
    return tuple(
        Row(
            role=role,
            std=std[role],
            lr=lr[role],
            eps=eps[role] if optimizer == "adam" else ONE,
            tied=tied and role in ("expert_up", "expert_down"),
        )
        for role in get_args(Role)
        if role in lr
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Factors of one role at given sizes, all 1 at the base: on the std of fan_in^-½ and so on, on learning rate, ε, decay."""

    std: float = 1.0
    lr: float = 1.0
    eps: float = 1.0
    decay: float = 1.0
    tied: bool = False


# What the factors of `Scale.std` are on: how a model's stds follow its sizes where nobody parameterizes them.
_DEFAULT_STD: dict[str, Power] = {
    "embedding": ONE, "gain": ONE, "attention": Power(n=-0.5), "dense": Power(n=-0.5), "router": Power(n=-0.5),
    "expert_up": Power(n=-0.5), "expert_down": Power(f=-0.5), "readout": Power(n=-0.5),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """A rule at `sizes`, anchored at `base`.

    `gate` multiplies the experts' sigmoid gates, which are not normalised; `residual` what each block adds to the stream.
    `by_role` holds the roles that the optimizer has a column for.
    """

    sizes: Sizes
    base: Sizes
    by_role: Mapping[str, Scale]
    gate: float
    residual: float

    def roles(self, model: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
        """Role of every parameter of `model`, from the first of `names` (part of a name to role) that occurs in its name.

        One with fewer than two axes that no name fits is a `gain`.

        Raises:
            UsageError: a parameter that no name fits, or a role that is unknown or has no column for the optimizer.
        """
        found = {}
        for name, parameter in model.named_parameters():
            role = next((role for part, role in names.items() if part in name), "gain" if parameter.ndim < 2 else None)
            if role is None:
                raise UsageError(f"parameterization: expected a role for {name}, found none; name a part of it")
            self.scale(role)
            found[name] = role
        return found

    def scale(self, role: str) -> Scale:
        """Factors of a role; raises `UsageError` for one that the optimizer has no column for."""
        if role not in self.by_role:
            raise UsageError(
                f"parameterization: expected a role of {', '.join(self.by_role)} (those that the table has a column for with "
                f"this optimizer), found {role!r}"
            )
        return self.by_role[role]

    @torch.no_grad()
    def rescale(self, model: nn.Module, roles: Mapping[str, str]) -> None:
        """Initial weights of `model`, as drawn with std fan_in^-½ (the embedding with a constant one), made the rule's.

        Experts' weights are stacked along their first axis, or, where each expert has a parameter of its own, are tied by
        hand. Call it once, before the first step.
        """
        for name, parameter in model.named_parameters():
            scale = self.scale(roles[name])
            if scale.std != 1:
                parameter.mul_(scale.std)
            if scale.tied:
                if parameter.ndim < 3:
                    raise UsageError(
                        f"parameterization: expected the experts of {name} stacked along a first axis of three"
                    )
                parameter.copy_(parameter[:1].expand_as(parameter).clone())

    def groups(
        self,
        model: nn.Module,
        roles: Mapping[str, str],
        *,
        lr: float,
        weight_decay: float = 0.0,
        eps: float | None = None,
    ) -> list[dict[str, Any]]:
        """Parameter groups for `torch.optim.AdamW` or `SGD`; leave `eps` out for SGD. A schedule has to keep their ratios."""
        groups = []
        for name, parameter in model.named_parameters():
            scale = self.scale(roles[name])
            group = {"params": [parameter], "lr": lr * scale.lr, "weight_decay": weight_decay * scale.decay}
            groups.append(group if eps is None else group | {"eps": eps * scale.eps})
        return groups


def scales(
    rule: Rule,
    *,
    regime: Regime,
    optimizer: Optimizer = "adam",
    sizes: Sizes,
    base: Sizes,
    zero_readout: bool | None = None,
) -> Scales:
    """Factors of `rule` at `sizes`, anchored at `base`; for `zero_readout` see `table`.

    Depth, if `sizes.num_layers` is not the base's, follows CompleteP: residual 1/L, ε of the weights inside the blocks 1/L.

    Raises:
        UsageError: an unknown rule, regime or optimizer; sizes that do not grow as the regime says; depth with SGD or SP.
    """
    rows = table(rule, regime, optimizer, zero_readout=zero_readout)
    _check_regime(regime, sizes, base)
    if sizes.num_layers != base.num_layers and (optimizer == "sgd" or rule == "sp"):
        raise UsageError(f"parameterization: depth is scaled with adam by mup or mssp, found {optimizer} with {rule}")
    by_role: dict[str, Scale] = {}
    for row in rows:
        eps = row.eps * Power(l=-1) if row.role in _HIDDEN else row.eps
        by_role[row.role] = Scale(
            std=0.0 if row.std is None else (row.std * _DEFAULT_STD[row.role].inverse())(sizes, base),
            lr=row.lr(sizes, base),
            eps=eps(sizes, base),
            decay=row.lr.inverse()(sizes, base),
            tied=row.tied,
        )
    alpha = 0.0 if regime == "I" or rule == "sp" else 1.0
    return Scales(
        sizes=sizes,
        base=base,
        by_role=by_role,
        gate=Power(k=-alpha)(sizes, base),
        residual=Power(l=-1)(sizes, base),
    )


def _check_regime(regime: str, sizes: Sizes, base: Sizes) -> None:
    """Raise unless every size grows with the width, or stays, as the regime says."""
    grows = {"I": ("d_expert",), "II": ("num_experts", "top_k"), "III": ("d_expert", "num_experts", "top_k")}[regime]
    for name in ("d_expert", "num_experts", "top_k"):
        value, anchor = getattr(sizes, name), getattr(base, name)
        factor = Fraction(sizes.d_model, base.d_model) if name in grows else 1
        if value != anchor * factor:
            raise UsageError(
                f"parameterization: expected {name} of {anchor * factor} at width {sizes.d_model} in regime {regime} "
                f"({'grows with the width' if name in grows else 'fixed'}; {anchor} at base width {base.d_model}), found {value}"
            )


def sizes_of(config: ModelConfig) -> Sizes:
    """Sizes of a model with experts."""
    return Sizes(
        d_model=config.d_model,
        d_expert=config.d_expert,
        num_experts=config.num_experts,
        top_k=config.top_k,
        num_layers=config.num_layers,
    )


def parameterize(
    config: ModelConfig,
    rule: Rule,
    *,
    regime: Regime,
    optimizer: Optimizer = "adam",
    base: ModelConfig,
    zero_readout: bool | None = None,
) -> ModelConfig:
    """`config` under `rule`, anchored at `base`, gates raw sigmoids: init and optimizer groups follow from its `weights`.

    Raises:
        UsageError: what `scales` raises; a width that is no multiple of the base's head size, or other heads; a model that
            has weights for which the optimizer has no column.
    """
    head = base.d_model // base.num_heads
    if config.kind != "mlp" and (config.d_model % head or config.num_heads != config.d_model // head):
        raise UsageError(
            f"parameterization: expected a width that is a multiple of the base's head size {head}, with a head for each, found "
            f"width {config.d_model} with {config.num_heads} heads"
        )
    found = scales(
        rule, regime=regime, optimizer=optimizer, sizes=sizes_of(config), base=sizes_of(base), zero_readout=zero_readout
    )
    weights = []
    for name, role in ROLES.items():
        if not _has(config, name):
            continue
        scale = found.scale(role)
        # the default std of what writes to the residual stream falls with depth, which the residual multiplier does here
        depth = Power(l=0.5)(found.sizes, found.base) if name in _WRITES_TO_STREAM and config.kind != "mlp" else 1.0
        weights.append(
            Weight(name=name, std=scale.std * depth, lr=scale.lr, eps=scale.eps, decay=scale.decay, tied=scale.tied)
        )
    return dataclasses.replace(
        config,
        score="sigmoid",
        renormalize=False,
        gate_scale=found.gate,
        residual_scale=found.residual,
        weights=tuple(weights),
    )


def _has(config: ModelConfig, name: str) -> bool:
    mlp = config.kind == "mlp"
    if name in ("embedding_VD", "w_qkv_DD", "w_out_DD", "gain_D"):
        return not mlp
    if name in ("w_up_DF", "w_down_FD"):
        return bool(config.d_shared or config.dense_layers)
    return name != "w_in_ID" or mlp


def text(rules: Iterable[Rule] = ("sp", "mup", "mssp")) -> str:
    """All tables, for reading: exponents of width N, expert width F, experts M, active experts K."""
    lines = ["N width, F expert width, M experts, K active; relative to the base sizes, where every factor is 1"]
    for optimizer in get_args(Optimizer):
        for regime in get_args(Regime):
            lines += ["", f"regime {regime}, {optimizer}"]
            found = {rule: {row.role: row for row in table(rule, regime, optimizer)} for rule in rules}
            header = f"{'weight':12}" + "".join(f"| {rule + ' std':18}| {'LR':8}" for rule in rules)
            lines.append(header + ("| ε (muP, MSSP)" if optimizer == "adam" else ""))
            for role in found["mup"]:
                cells = "".join(f"| {_std(found[rule][role]):18}| {found[rule][role].lr!s:8}" for rule in rules)
                eps = f"| {found['mup'][role].eps}" if optimizer == "adam" else ""
                lines.append(f"{role:12}{cells}{eps}")
            alpha = 0 if regime == "I" else 1
            lines.append(f"{'gate':12}| raw sigmoid × (K_base/K)^{alpha}; sp × 1; weight decay × 1/LR")
    lines += [
        "",
        "depth (CompleteP, α = 1; adam): residual × L^-1, ε inside the blocks × L^-1, learning rates as they are",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _std(row: Row) -> str:
    if row.std is None:
        return "0"
    text = "fan_in^-½" if row.role in ("attention", "dense") else "(gain 1)" if row.role == "gain" else str(row.std)
    return text + (", tied" if row.tied else "")
