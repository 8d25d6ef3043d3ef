"""Figures as SVG: every seed, the mean over seeds, and its 95% Student interval."""

import io
import math
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure as Canvas

from repro.experiment import Figure
from repro.judge import Evidence

# Okabe and Ito's palette: told apart with any colour vision; markers tell the curves apart without colour too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = "osD^vP"


def draw(
    figure: Figure, evidence: Evidence, *, seeds: Sequence[int], chosen: Mapping[str, str], labels: Mapping[str, str]
) -> str:
    """SVG text of `figure`; `chosen` names the arm that stands for a group, `labels` how arms and groups are called.

    A curve without complete evidence is left out, and the legend says so.
    """
    with matplotlib.rc_context({"svg.hashsalt": "repro", "svg.fonttype": "none", "font.family": "sans-serif"}):
        canvas = Canvas(figsize=(7.2, 4.2), layout="constrained")
        axes = canvas.subplots()
        for number, curve in enumerate(figure.curves):
            arm = chosen.get(curve.arm, curve.arm)
            colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
            label = labels.get(curve.arm, curve.arm)
            lines = [
                [float(result.metrics[name]) for name in curve.metrics]
                for seed in seeds
                if (result := evidence.get((arm, seed))) and all(name in result.metrics for name in curve.metrics)
            ]
            if not lines:
                axes.plot([], [], color=colour, marker=marker, label=f"{label}: not measured")
                continue
            for line in lines:
                axes.plot(figure.x, line, color=colour, alpha=0.35, linewidth=0.8)
            means = [math.fsum(values) / len(values) for values in zip(*lines, strict=True)]
            halves = [_half_interval(values) for values in zip(*lines, strict=True)]
            axes.errorbar(
                figure.x, means, yerr=halves, color=colour, marker=marker, markersize=5, capsize=3,
                label=f"{label} ({len(lines)} seeds)",
            )  # fmt: skip
        axes.set(xlabel=figure.x_label, ylabel=figure.y_label)
        axes.set_xticks(figure.x)
        axes.grid(alpha=0.25)
        canvas.legend(loc="outside lower center", ncols=2, frameon=False)
        out = io.StringIO()
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    return svg[svg.index("<svg") :]


def _half_interval(values: Sequence[float]) -> float:
    """Half the 95% Student interval of the mean; 0 for a single value, which has none."""
    from scipy import special

    n = len(values)
    if n < 2:
        return 0.0
    mean = math.fsum(values) / n
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return float(special.stdtrit(n - 1, 0.975)) * sd / math.sqrt(n)
