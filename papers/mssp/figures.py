"""MSSP's figures: terms against width (log-log, every seed), losses against width, losses against the learning rate by width."""

from collections.abc import Iterable, Iterator, Sequence

from papers.mssp.settings import CONTROLS, REGIMES, SGD_CONTROL, Setting, Sweep, times
from repro.experiment import Curve, Figure
from repro.model import ModelConfig

_TERMS = ("init", "propagating", "effective", "gradient", "backward")


def figures(setting: Setting) -> Iterator[Figure]:
    for regime in REGIMES:
        widths = setting.widths[regime]
        for term in (*_TERMS, "router") if regime == "I" else _TERMS:
            yield Figure(
                title=f"Regime {regime}: {term} of the classifier's MoE layer after 2 steps",
                x_label="width N",
                y_label=f"RMS, {term}" if term != "backward" else "RMS(W₀ᵀδ) / RMS(ΔWᵀδ)",
                x=tuple(map(float, widths)),
                curves=_curves(
                    f"check-{{}}-{regime}",
                    ("mup", "mssp", *CONTROLS[regime]),
                    setting.mlp[regime],
                    widths,
                    f"t2/{term}",
                ),
                log="xy",
            )
        yield Figure(
            title=f"Regime {regime}: held-out loss of the classifier with SGD against scale",
            x_label="width N",
            y_label="held-out loss, nats",
            x=tuple(map(float, widths)),
            curves=tuple(
                Curve(
                    arm=f"{rule}, learning rate 2^{rate}",
                    arms=tuple(f"sgd-{rule}-{regime}-{times(setting.mlp[regime], width)}-lr{rate}" for width in widths),
                    metrics=("loss",) * len(widths),
                )
                for rule, rate in (*(("mssp", rate) for rate in setting.rates), (SGD_CONTROL[regime], setting.rates[0]))
            ),
            log="x",
        )
    for regime in setting.text:
        for term in _TERMS:
            yield Figure(
                title=f"Regime {regime}: {term} of the transformer's MoE layers after 2 steps",
                x_label="width N",
                y_label=f"RMS, {term}",
                x=tuple(map(float, setting.text_widths)),
                curves=_curves(
                    f"text-{{}}-{regime}", ("mup", "mssp"), setting.text[regime], setting.text_widths, f"t2/{term}"
                ),
                log="xy",
            )
    if setting.sweep:
        yield from _sweep_figures(setting.sweep)


def _curves(
    stem: str, rules: Iterable[str], base: ModelConfig, widths: Sequence[int], metric: str
) -> tuple[Curve, ...]:
    return tuple(
        Curve(
            arm=rule,
            arms=tuple(f"{stem.format(rule)}-{times(base, width)}" for width in widths),
            metrics=(metric,) * len(widths),
        )
        for rule in rules
    )


def _sweep_figures(sweep: Sweep) -> Iterator[Figure]:
    kinds = [
        (f"sweep-{rule}-{regime}", [(times(base, width), width) for width in sweep.widths])
        for regime, base in sweep.base.items()
        for rule in ("mup", "mssp", "sp")
    ]
    depths = [(str(layers), layers) for layers in sweep.layers]
    for stem, sizes in (*kinds, ("deep-mssp", depths), ("deep-plain", depths)):
        yield Figure(
            title=f"{stem}: held-out loss of the transformer against the learning rate",
            x_label="base learning rate",
            y_label="held-out loss, nats/byte",
            x=tuple(2.0**rate for rate in sweep.rates),
            curves=tuple(
                Curve(
                    arm=f"{'layers' if stem.startswith('deep') else 'width'} {size}",
                    arms=tuple(f"{stem}-{name}-lr{rate}" for rate in sweep.rates),
                    metrics=("loss",) * len(sweep.rates),
                )
                for name, size in sizes
            ),
            log="x",
        )
