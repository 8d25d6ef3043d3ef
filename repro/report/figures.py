"""Figures as SVG: every seed, the mean over seeds, and its 95% interval.

- against chosen x values: metrics, and the share of a gap that is closed (η)
- along training: loss against tokens or measured seconds, probed measures, and maps of each expert's load
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from repro.experiment import Curve, Figure
from repro.judge import Evidence
from repro.stats import FitError, bootstrap, gap_closure, half_interval, optimum, parabola, vertex
from repro.trace import Probe

# Okabe and Ito's palette: told apart with any colour vision; markers tell the curves apart without colour too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = "osD^vP"
_MAP_LAYERS = 4  # maps a row: of more layers, as many are drawn, from the first to the last

READING = {
    "metrics": "Thin lines: each seed; marks: mean and its 95% interval over seeds.",
    "fit": "Thin lines: each seed; marks: mean, 95% interval; dashed: parabola in log x, its 95% band, and its optimum's.",
    "reach": "Thin lines: each seed; marks: mean, 95% interval; dashed: where the parabola around the lowest point is lowest.",
    "closure": "Thin lines: each seed; marks: the share that the sums over seeds close, and its 95% bootstrap interval.",
    "cells": "Small dots: each seed; marks: mean and its 95% interval over seeds.",
    **dict.fromkeys(
        ("training", "time", "probe"),
        "A line each seed; marks show where the pool grew, or another part of the training began.",
    ),
    "load": "A row each arm and seed, a column each layer; 1 is an even share of the tokens, lines show where the pool grew.",
}
"""How to read a figure, by its kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Courses:
    """What went on during training, by arm and seed, for each of its parts: a segment with those that just go on from it.

    `losses` are (tokens since the arm's start, mean loss of a step group), `timed` the same by measured seconds, `probes`
    (tokens since the arm's start, a look at the live model).
    """

    losses: Mapping[tuple[str, int], Sequence[Sequence[tuple[int, float]]]] = field(default_factory=dict)
    timed: Mapping[tuple[str, int], Sequence[Sequence[tuple[float, float]]]] = field(default_factory=dict)
    probes: Mapping[tuple[str, int], Sequence[Sequence[tuple[int, Probe]]]] = field(default_factory=dict)


def draw(
    figure: Figure,
    evidence: Evidence,
    courses: Courses,
    *,
    seeds: Sequence[int],
    chosen: Mapping[str, str],
    labels: Mapping[str, str],
) -> str:
    """SVG text of `figure`; `chosen` names the arm that stands for a group, `labels` how arms and groups are called.

    A curve without complete evidence is left out, and the legend says so.
    """
    with matplotlib.rc_context({"svg.hashsalt": "repro", "svg.fonttype": "none", "font.family": "sans-serif"}):
        if figure.kind == "load":
            canvas = _maps(figure, courses, seeds=seeds, chosen=chosen)
        elif figure.kind == "cells":
            canvas = _cells(figure, differences(figure, evidence, seeds=seeds, chosen=chosen))
        else:
            canvas = _lines(figure, evidence, courses, seeds=seeds, chosen=chosen, labels=labels)
        out = io.StringIO()
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    return svg[svg.index("<svg") :]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Style:
    colour: str
    marker: str
    label: str


def _lines(
    figure: Figure,
    evidence: Evidence,
    courses: Courses,
    *,
    seeds: Sequence[int],
    chosen: Mapping[str, str],
    labels: Mapping[str, str],
) -> Canvas:
    canvas = Canvas(figsize=(7.2, 4.2), layout="constrained")
    axes = canvas.subplots()
    for number, curve in enumerate(figure.curves):
        style = _Style(
            colour=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            label=labels.get(curve.arm, curve.arm),
        )
        if figure.kind == "metrics":
            points = _points(figure, curve, chosen)
            lines = [line for seed in seeds if (line := _line(evidence, points, seed, gaps=bool(figure.log)))]
            _metrics(axes, figure.x, lines, style)
            if figure.log:
                _diverged(axes, figure.x, lines, style, number)
            if figure.fit and curve.arms and lines:
                _fit(axes, figure.x, lines, style)
            if figure.reach and curve.arms:
                _lowest(axes, figure.x, lines, style, figure.reach)
        elif figure.base and figure.target:
            paths = [_points(figure, part, chosen) for part in (figure.base, curve, figure.target)]
            found = [[_line(evidence, points, seed) for points in paths] for seed in seeds]
            _closure(axes, figure.x, [lines for lines in found if all(lines)], style)
        else:
            arm = chosen.get(curve.arm, curve.arm)
            _course(axes, [path for seed in seeds if any(path := _along(figure, curve, courses, arm, seed))], style)
    axes.set(xlabel=figure.x_label, ylabel=figure.y_label)
    if figure.fit:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    if figure.log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    if figure.log == "xy":
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:.3g}")
    if figure.over_x:
        axes.set_xticks(figure.x)
    axes.grid(alpha=0.25)
    canvas.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return canvas


def differences(
    figure: Figure, evidence: Evidence, *, seeds: Sequence[int], chosen: Mapping[str, str]
) -> dict[str, list[list[float]]]:
    """Of a figure of `cells`: by curve, for each row, the metric above the base's with each seed that has both."""
    assert figure.base
    base = _points(figure, figure.base, chosen)
    found: dict[str, list[list[float]]] = {}
    for curve in figure.curves:
        pairs = zip(_points(figure, curve, chosen), base, strict=True)
        lines = [[_line(evidence, pair, seed) for seed in seeds] for pair in pairs]
        found[curve.arm] = [[line[0] - line[1] for line in row if line] for row in lines]
    return found


def _cells(figure: Figure, found: Mapping[str, Sequence[Sequence[float]]]) -> Canvas:
    rows = len(figure.names)
    canvas = Canvas(figsize=(7.2, 1.4 + 0.2 * rows), layout="constrained")
    axes = canvas.subplots()
    axes.axvline(0, color="black", linewidth=0.8)
    for number, (name, cells) in enumerate(found.items()):
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
        places = [row + 0.22 * (number - (len(found) - 1) / 2) for row in range(rows)]
        for place, values in zip(places, cells, strict=True):
            axes.plot(values, [place] * len(values), ".", color=colour, markersize=2, alpha=0.6)
        measured = [(place, values) for place, values in zip(places, cells, strict=True) if values]
        axes.errorbar(
            [math.fsum(values) / len(values) for _, values in measured], [place for place, _ in measured],
            xerr=[half_interval(values) for _, values in measured], color=colour, marker=marker, markersize=3.5,
            linestyle="none", elinewidth=0.8, label=f"{name} ({max(map(len, cells))} seeds)",
        )  # fmt: skip
    axes.set_yticks(range(rows), labels=figure.names, fontsize=6)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set(xlabel=figure.x_label, ylabel=figure.y_label)
    axes.grid(alpha=0.25)
    canvas.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return canvas


def _points(figure: Figure, curve: Curve, chosen: Mapping[str, str]) -> list[tuple[str, str]]:
    """Arm and metric of a curve at each x value."""
    arms = [chosen.get(arm, arm) for arm in curve.arms or [curve.arm] * len(figure.x)]
    return list(zip(arms, curve.metrics, strict=True))


def _line(evidence: Evidence, points: Sequence[tuple[str, str]], seed: int, *, gaps: bool = False) -> list[float]:
    """Values of one seed at all points, or nothing where one is lacking; with `gaps` NaN for a diverged arm."""
    results = [(evidence.get((arm, seed)), name) for arm, name in points]
    if gaps and any(result is not None and result.status != "diverged" for result, _ in results):
        results = [
            (replace(result, metrics={name: "nan"}) if result and result.status == "diverged" else result, name)
            for result, name in results
        ]
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
    halves = [half_interval(values) for values in zip(*lines, strict=True)]
    axes.errorbar(
        x, means, yerr=halves, color=style.colour, marker=style.marker, markersize=5, capsize=3,
        label=f"{style.label} ({len(lines)} seeds)",
    )  # fmt: skip


def _diverged(axes: Axes, x: Sequence[float], lines: Sequence[Sequence[float]], style: _Style, number: int) -> None:
    """A cross below the top edge, a row for each curve, wherever a seed diverged."""
    lost = sorted({at for line in lines for at, value in zip(x, line, strict=True) if math.isnan(value)})
    if lost:
        axes.plot(
            lost, [0.97 - 0.04 * number] * len(lost), "x", color=style.colour, label=f"{style.label}: diverged",
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip


_FIT_POINTS = 60


def _fit(axes: Axes, x: Sequence[float], lines: Sequence[Sequence[float]], style: _Style) -> None:
    """The mean of the seeds' parabolas in log x, dashed; with several seeds its 95% bootstrap band, and that of its optimum."""
    at = [x[0] * (x[-1] / x[0]) ** (place / (_FIT_POINTS - 1)) for place in range(_FIT_POINTS)]
    fits = list(zip(*(parabola(x, line, at) for line in lines), strict=True))
    axes.plot(at, [math.fsum(values) / len(values) for values in fits], "--", color=style.colour, linewidth=1)
    if len(lines) > 1:
        bands = [bootstrap(values) for values in fits]
        axes.fill_between(
            at, [band.low for band in bands], [band.high for band in bands], color=style.colour, alpha=0.12, linewidth=0
        )
        best = bootstrap([optimum(x, line) for line in lines])
        axes.axvspan(2**best.low, 2**best.high, color=style.colour, alpha=0.12, linewidth=0)


def _lowest(axes: Axes, x: Sequence[float], lines: Sequence[Sequence[float]], style: _Style, reach: int) -> None:
    """Where the parabola around each seed's lowest point is lowest: the mean over seeds and its 95% bootstrap interval.

    Nothing where the fit of any seed is not to be had, as no verdict would rest on it either.
    """
    try:
        found = [vertex(x, [math.inf if math.isnan(y) else y for y in line], reach=reach) for line in lines]
    except FitError:
        return
    if len(found) > 1:
        best = bootstrap(found)
        axes.axvspan(2**best.low, 2**best.high, color=style.colour, alpha=0.12, linewidth=0)
        axes.axvline(2**best.mean, color=style.colour, linestyle="--", linewidth=1)


def _closure(axes: Axes, x: Sequence[float], seeds: Sequence[Sequence[Sequence[float]]], style: _Style) -> None:
    """η at each x, from the lines (base, method, target) of each seed; none where there is no gap to close."""
    for base, method, target in seeds:
        shares = [(b - m) / (b - t) if b > t else math.nan for b, m, t in zip(base, method, target, strict=True)]
        axes.plot(x, shares, color=style.colour, alpha=0.35, linewidth=0.8)
    found = []
    for place in range(len(x)) if len(seeds) > 1 else ():
        base, method, target = ([lines[part][place] for lines in seeds] for part in range(3))
        if closure := gap_closure(base, method, target):
            found.append((x[place], closure))
    if not found:
        axes.plot([], [], color=style.colour, marker=style.marker, label=f"{style.label}: no gap measured")
        return
    errors = [[c.eta - c.low for _, c in found], [c.high - c.eta for _, c in found]]
    axes.errorbar(
        [place for place, _ in found], [c.eta for _, c in found], yerr=errors, color=style.colour, marker=style.marker,
        markersize=5, capsize=3, label=f"{style.label} ({len(seeds)} seeds)",
    )  # fmt: skip


def _along(figure: Figure, curve: Curve, courses: Courses, arm: str, seed: int) -> list[list[tuple[float, float]]]:
    """What the figure shows of an arm and seed along its training, by segment."""
    if figure.kind != "probe":
        found = (courses.losses if figure.kind == "training" else courses.timed).get((arm, seed), ())
        return [list(segment) for segment in found]
    (name,) = curve.metrics
    return [
        [(tokens, math.fsum(value) / len(value)) for tokens, probe in segment if (value := probe.values.get(name))]
        for segment in courses.probes.get((arm, seed), ())
    ]


def _course(axes: Axes, seeds: Sequence[Sequence[Sequence[tuple[float, float]]]], style: _Style) -> None:
    label = f"{style.label} ({len(seeds)} seeds)" if seeds else f"{style.label}: not measured"
    axes.plot([], [], color=style.colour, label=label)
    for segments in seeds:
        x, values = zip(*(point for segment in segments for point in segment), strict=True)
        axes.plot(x, values, color=style.colour, linewidth=0.7, alpha=0.7)
        for segment in segments[1:]:
            if segment:
                axes.plot(*segment[0], color=style.colour, marker=style.marker, markersize=4)


def _maps(figure: Figure, courses: Courses, *, seeds: Sequence[int], chosen: Mapping[str, str]) -> Canvas:
    """Each expert's share of the tokens against an even one, over tokens; experts that do not exist yet stay blank."""
    arms = [chosen.get(curve.arm, curve.arm) for curve in figure.curves]
    found = {
        (arm, seed): points
        for arm in arms
        for seed in seeds
        if (points := [point for segment in courses.probes.get((arm, seed), ()) for point in segment if point[1].load])
    }
    if not found:
        canvas = Canvas(figsize=(7.2, 1), layout="constrained")
        canvas.text(0.5, 0.5, f"{', '.join(arms)}: not measured", ha="center")
        return canvas
    layers = min(len(probe.load) for points in found.values() for _, probe in points)
    columns = min(layers, _MAP_LAYERS)
    shown = [round(number * (layers - 1) / max(1, columns - 1)) for number in range(columns)]
    canvas = Canvas(figsize=(7.2, 0.6 + 1.1 * len(found)), layout="constrained")
    grid = canvas.subplots(len(found), columns, squeeze=False, sharex=True, sharey=True)
    for row, ((arm, seed), points) in zip(grid, found.items(), strict=True):
        experts = max(len(probe.load[0]) for _, probe in points)
        tokens = [place for place, _ in points]
        for axes, layer in zip(row, shown, strict=True):
            shares = _shares([probe.load[layer] for _, probe in points], experts)
            image = axes.pcolormesh(
                [*tokens, 2 * tokens[-1] - tokens[-2] if len(tokens) > 1 else tokens[-1] + 1], range(experts + 1), shares,
                cmap="viridis", vmin=0, vmax=3, rasterized=True,
            )  # fmt: skip
            for (place, probe), (_, before) in zip(points[1:], points, strict=False):
                if len(probe.load[layer]) != len(before.load[layer]):
                    axes.axvline(place, color="#D55E00", linewidth=0.8)
        row[0].set_ylabel(f"{arm}\nseed {seed}", fontsize=7)
    for axes, layer in zip(grid[0], shown, strict=True):
        axes.set_title(f"layer {layer + 1} of {layers}", fontsize=8)
    for axes in grid.flat:
        axes.tick_params(labelsize=6)
        axes.xaxis.get_offset_text().set_fontsize(6)
    canvas.supxlabel(figure.x_label, fontsize=8)
    canvas.supylabel(figure.y_label, fontsize=8)
    canvas.colorbar(image, ax=grid, label="load, 1 is even", extend="max")
    return canvas


def _shares(loads: Sequence[Sequence[int]], experts: int) -> list[list[float]]:
    """Each expert's share of the assignments times the number of experts, by expert and place; NaN before it exists."""
    return [
        [load[e] * len(load) / max(1, sum(load)) if e < len(load) else math.nan for load in loads]
        for e in range(experts)
    ]
