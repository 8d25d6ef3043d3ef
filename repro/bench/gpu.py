"""A session on a machine with a GPU in one command: the core's tests there, tiles, and the benchmarks, each step bounded.

- `tests`: tests/moe/test_cuda.py, where this is a checkout and pytest is there
- `tune`: `repro bench tune`, which writes tiles.json; a second call goes on with the widths that are left
- `moe`, `train`: those benchmarks, with tiles.json if it is there

Each step is a process of its own and leaves its JSON, or what the tests printed, in the folder; then tables.md is made anew
from all that lies there (`tables`). Nothing is installed: the Python that runs this is used, and what it lacks is named.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import repro
from records.errors import UsageError

STEPS = ("tests", "tune", "moe", "train")
_TESTS = Path(repro.__file__).parents[1] / "tests" / "moe" / "test_cuda.py"
# What a step is given beyond its budget to end by itself: the last shape, or the last pair of widths.
_GRACE_S = 60


def run(
    out: Path, *, steps: str | None, budget: float | None, say: Callable[[str], object], shapes: str | None = None
) -> int:
    """Run the steps named (all by default) with results in `out`, each for at most `budget` minutes (default 9).

    `shapes` are those of `tune` and `moe`, as --shapes has them. Says a line a step. Returns 0, or 1 where a step failed or
    ran out of time; the others are run nevertheless. Raises `UsageError` for a step that is none, or where torch sees no GPU.
    """
    chosen = tuple(steps.split(",")) if steps else STEPS
    unknown = [step for step in chosen if step not in STEPS]
    minutes = 9.0 if budget is None else budget
    if unknown or minutes * 60 <= _GRACE_S:
        raise UsageError(
            f"bench gpu: expected steps of {', '.join(STEPS)} and a budget above {_GRACE_S // 60} minute, found "
            f"{', '.join(chosen)} and {minutes:g}"
        )
    from repro.environment import require_torch

    require_torch()
    import torch

    if not torch.cuda.device_count():
        raise UsageError(
            "bench gpu: expected a GPU that torch sees, found none; repro bench moe and train run on a CPU"
        )
    out.mkdir(parents=True, exist_ok=True)
    codes = [_step(name, out, minutes, shapes, say) for name in chosen]
    (out / "tables.md").write_text(tables(out), encoding="utf-8")
    say(f"{out / 'tables.md'}: the results as tables")
    return max(codes)


def _step(name: str, out: Path, minutes: float, shapes: str | None, say: Callable[[str], object]) -> int:
    """0, or 1 where the step failed or ran out of time."""
    target = out / ("tests.txt" if name == "tests" else f"{name}.json")
    command = _command(name, out, minutes, shapes)
    if command is None:
        say(f"{name}: skipped, for there is no {_TESTS.name} here, or no pytest")
        return 0
    began = time.monotonic()
    temporary = target.with_suffix(".part")
    # From any folder: this code may lie in a checkout that is not installed.
    paths = [str(_TESTS.parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with temporary.open("wb") as file:
        both = subprocess.STDOUT if name == "tests" else None
        try:
            done = subprocess.run(command, stdout=file, stderr=both, timeout=60 * minutes, env=environment, check=False)
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = -1
    temporary.replace(target)
    state = "out of time" if code == -1 else "done" if code == 0 else f"exit code {code}"
    say(f"{name}: {state} after {(time.monotonic() - began) / 60:.1f} minutes, {target}")
    return int(code != 0)


def _command(name: str, out: Path, minutes: float, shapes: str | None = None) -> list[str] | None:
    if name == "tests":
        if not _TESTS.exists() or importlib.util.find_spec("pytest") is None:
            return None
        # Warnings are no errors here: the torch of such a machine is seldom the one whose warnings are known.
        return [sys.executable, "-m", "pytest", "-q", "-rs", "-W", "default", "-p", "no:cacheprovider", str(_TESTS)]
    bench = [sys.executable, "-m", "repro", "bench", name, "--device", "cuda", "--json"]
    tiles = out / "tiles.json"
    if name == "tune" or tiles.exists():
        bench += ["--tiles", str(tiles)]
    if name == "train":
        return bench
    return [*bench, *(["--shapes", shapes] if shapes else []), "--budget", f"{minutes - _GRACE_S / 60:g}"]


def tables(folder: Path) -> str:
    """The results that lie in `folder` as Markdown; a step whose result is missing, or broke off, is left out by name."""
    parts = []
    for name, table in (("moe", _moe), ("tune", _tune), ("train", _train)):
        try:
            data = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            data = None
        parts.append(table(data) if isinstance(data, dict) else f"{name}: no result here.\n")
    return "\n".join(parts)


_COLUMNS = ("dense", "gemms", "triton", "grouped", "torch", "liger", "sonic", "transformers", "layer", "layer-triton")


def _moe(data: Mapping[str, Any]) -> str:
    found = ", ".join(f"{name} {version}" for name, version in data["peers"].items()) or "none"
    text = f"{data['capability']}, torch {data['torch']}, {data['dtype']}, {data['rounds']} rounds; peers: {found}.\n"
    if data["shapes_left"]:
        text += f"{data['shapes_left']} shapes were not begun within the budget.\n"
    for direction in ("forward", "backward"):
        rows = []
        for shape in data["shapes"]:
            rates, shares = shape.get(f"{direction}_tflop_per_s", {}), shape.get(f"{direction}_share_of_gemms", {})
            share = f"{shares['triton']['median']:.2f}" if "triton" in shares else ""
            rows.append([_sizes(shape), *(f"{rates[name]:.0f}" if name in rates else "" for name in _COLUMNS), share])
        text += f"\nTFLOP/s, {direction}, and what share of the rate of `gemms` `triton` reaches:\n\n"
        text += _table(["T, d, n, E, k", *_COLUMNS, "share"], rows)
    rows = []
    for shape in data["shapes"]:
        cost, goal = shape.get("cost_of_determinism", {}), shape.get("goal", {})
        named = [f"{name}: {why}" for kind in ("failed", "absent") for name, why in shape.get(kind, {}).items()]
        reached = f"{_spread(goal['reached'])} of {goal['share_of_gemms']}" if "reached" in goal else ""
        rows.append(
            [_sizes(shape), reached, *(_spread(cost.get(name)) for name in ("layer", "layer-triton")), "; ".join(named)]
        )
    text += "\nShare of the rate of `gemms`, both directions, and its goal; time under the deterministic flags as a multiple:\n\n"
    return text + _table(["T, d, n, E, k", "share and goal", "layer", "layer-triton", "failed or absent"], rows)


def _tune(data: Mapping[str, Any]) -> str:
    text = f"Tiles, on {data['place']}, {data['minutes']} minutes; {data['widths_left']} pairs of widths left.\n\n"
    rows = []
    for widths in data["widths"]:
        for launch, found in widths.get("launches", {"": {}}).items():
            times = [f"{found[key]:.3f}" if key in found else "" for key in ("before", "after")]
            tile = " ".join(map(str, found.get("tile", [widths.get("failed", "")])))
            refused = "; ".join(f"{name}: {why}" for name, why in found.get("refused", {}).items())
            rows.append([f"{widths['d_model']}, {widths['d_expert']}", launch, *times, tile, refused])
    return text + _table(["d, n", "launch", "ms before", "ms after", "tile", "refused"], rows)


def _train(data: Mapping[str, Any]) -> str:
    text = f"Training, on {data['device']}, torch {data['torch']}; one large GEMM at {data['gemm_flops'] / 1e12:.0f} TFLOP/s.\n\n"
    rows = [
        [
            size["size"],
            f"{size['tokens_per_second']:,.0f}",
            f"{1e3 * size['seconds_a_step']['median']:.1f}",
            f"{size['flops_utilisation']:.1%}",
            f"{size['optimizer_share']:.1%}",
            _spread(size["cost_of_determinism"]),
            f"{size['peak_bytes'] / 2**30:.1f}",
        ]
        for size in data["sizes"]
    ]
    text += _table(["size", "tokens/s", "ms a step", "utilisation", "optimizer", "deterministic", "GiB"], rows)
    rows = [
        [str(point["num_experts"]), f"{1e3 * point['seconds_a_step']['median']:.1f}", _spread(point["ratio"])]
        for point in data["experts"]
    ]
    return text + "\n" + _table(["experts", "ms a step", "against the fewest"], rows)


def _sizes(shape: Mapping[str, Any]) -> str:
    sizes = ", ".join(str(shape[name]) for name in ("tokens", "d_model", "d_expert", "num_experts", "top_k"))
    return sizes if shape["load"] == "balanced" else f"{sizes}, {shape['load']}"


def _spread(value: Mapping[str, float] | None) -> str:
    return "" if value is None else f"{value['median']:.3g} ({value['low']:.3g} to {value['high']:.3g})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |\n" for row in cells)
