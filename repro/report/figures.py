"""Figures as SVG: every seed, the mean over seeds, and its 95% Student interval."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from repro.experiment import Figure
from repro.judge import Evidence

# Okabe and Ito's palette: told apart with any colour vision; markers tell the curves apart without colour too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = "osD^vP"


Losses = Mapping[tuple[str, int], Sequence[Sequence[tuple[int, float]]]]
"""By arm and seed: for each of its segments, (tokens since the arm's start, mean loss of a step group)."""


def draw(
    figure: Figure,
    evidence: Evidence,
    losses: Losses,
    *,
    seeds: Sequence[int],
    chosen: Mapping[str, str],
    labels: Mapping[str, str],
) -> str:
    """SVG text of `figure`; `chosen` names the arm that stands for a group, `labels` how arms and groups are called.

    A curve without complete evidence is left out, and the legend says so.
    """
    with matplotlib.rc_context({"svg.hashsalt": "repro", "svg.fonttype": "none", "font.family": "sans-serif"}):
        canvas = Canvas(figsize=(7.2, 4.2), layout="constrained")
        axes = canvas.subplots()
        for number, curve in enumerate(figure.curves):
            style = _Style(
                colour=_COLOURS[number % len(_COLOURS)],
                marker=_MARKERS[number % len(_MARKERS)],
                label=labels.get(curve.arm, curve.arm),
            )
            if figure.kind == "training":
                arm = chosen.get(curve.arm, curve.arm)
                _training(axes, [losses[arm, seed] for seed in seeds if (arm, seed) in losses], style)
            else:
                arms = [chosen.get(arm, arm) for arm in curve.arms or [curve.arm] * len(figure.x)]
                points = list(zip(arms, curve.metrics, strict=True))
                _metrics(axes, figure.x, [line for seed in seeds if (line := _line(evidence, points, seed))], style)
        axes.set(xlabel=figure.x_label, ylabel=figure.y_label)
        if figure.kind == "metrics":
            axes.set_xticks(figure.x)
        axes.grid(alpha=0.25)
        canvas.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        out = io.StringIO()
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    return svg[svg.index("<svg") :]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Style:
    colour: str
    marker: str
    label: str


def _line(evidence: Evidence, points: Sequence[tuple[str, str]], seed: int) -> list[float]:
    """Values of one seed at all points, or nothing where one is lacking."""
    results = [(evidence.get((arm, seed)), name) for arm, name in points]
    if any(result is None or name not in result.metrics for result, name in results):
        return []
    return [float(result.metrics[name]) for result, name in results if result]


def _metrics(axes: Axes, x: Sequence[float], lines: Sequence[Sequence[float]], style: _Style) -> None:
    if not lines:
        axes.plot([], [], color=style.colour, marker=style.marker, label=f"{style.label}: not measured")
        return
    for line in lines:
        axes.plot(x, line, color=style.colour, alpha=0.35, linewidth=0.8)
    means = [math.fsum(values) / len(values) for values in zip(*lines, strict=True)]
    halves = [_half_interval(values) for values in zip(*lines, strict=True)]
    axes.errorbar(
        x, means, yerr=halves, color=style.colour, marker=style.marker, markersize=5, capsize=3,
        label=f"{style.label} ({len(lines)} seeds)",
    )  # fmt: skip


def _training(axes: Axes, seeds: Sequence[Sequence[Sequence[tuple[int, float]]]], style: _Style) -> None:
    label = f"{style.label} ({len(seeds)} seeds)" if seeds else f"{style.label}: not measured"
    axes.plot([], [], color=style.colour, label=label)
    for segments in seeds:
        tokens, values = zip(*(point for segment in segments for point in segment), strict=True)
        axes.plot(tokens, values, color=style.colour, linewidth=0.7, alpha=0.7)
        for segment in segments[1:]:
            axes.plot(*segment[0], color=style.colour, marker=style.marker, markersize=4)


def _half_interval(values: Sequence[float]) -> float:
    """Half the 95% Student interval of the mean; 0 for a single value, which has none."""
    from scipy import special

    n = len(values)
    if n < 2:
        return 0.0
    mean = math.fsum(values) / n
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return float(special.stdtrit(n - 1, 0.975)) * sd / math.sqrt(n)
