"""`repro bench verify|moe|train|determinism|tune|gpu`: ratios measured side by side, for people or as JSON."""

import argparse
import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from records.errors import UsageError


def add_parser(subparsers: Any) -> None:
    """Add the command to `subparsers`."""
    command = subparsers.add_parser("bench", help="speed ratios, measured side by side in one run")
    command.add_argument("what", choices=("verify", "moe", "train", "determinism", "tune", "gpu"))
    command.add_argument("--json", action="store_true", help="one JSON object with every figure and its spread")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="moe, train and tune (default: cpu)")
    command.add_argument(
        "--budget",
        type=float,
        metavar="MINUTES",
        help="moe and tune: begin no shape later; gpu: for each step (default: 9)",
    )
    command.add_argument(
        "--shapes",
        metavar="1,2,…",
        help="moe: these of the list alone, by their place in it; tune: their widths; gpu: for both",
    )
    command.add_argument(
        "--tiles", type=Path, metavar="FILE", help="moe and train: this table of tile sizes; tune: where to write it"
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="gpu: where the results go (default: runs/gpu)")
    command.add_argument("--steps", metavar="S,…", help="gpu: of tests, tune, moe, train (default: all)")
    command.add_argument(
        "--python", action="append", default=[], metavar="PATH", help="determinism: also judge with this interpreter"
    )
    command.set_defaults(func=_run)


def _run(arguments: argparse.Namespace) -> int:
    for path in arguments.python:
        if shutil.which(path) is None:
            raise UsageError(f"--python: expected a Python interpreter, found no program {path!r}")
    code = 0
    if arguments.what == "verify":
        from repro.bench import verify

        result = verify.measure()
    elif arguments.what == "gpu":
        from repro.bench import gpu

        out = arguments.out or Path("runs/gpu")
        return gpu.run(out, steps=arguments.steps, budget=arguments.budget, shapes=arguments.shapes, say=print)
    else:
        from repro.environment import require_torch

        require_torch()
        if arguments.what == "determinism":
            from repro.bench import determinism

            result = determinism.measure(interpreters=arguments.python)
        elif arguments.what == "tune":
            result, code = _tune(arguments)
        else:
            with _tiles(arguments.tiles):
                result, code = _moe(arguments) if arguments.what == "moe" else (_train(arguments), 0)
    if arguments.json:
        print(json.dumps(result))
    else:
        _show(result)
    return code


def _moe(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """The result, and 1 where a way of ours to compute it failed."""
    from repro.bench import moe, peers

    result = moe.measure(device=arguments.device, shapes=_shapes(arguments), budget=arguments.budget)
    failed = {name for shape in result["shapes"] for name in shape["failed"]}
    return result, int(bool(failed - set(peers.NAMES)))


def _train(arguments: argparse.Namespace) -> dict[str, Any]:
    from repro.bench import train

    return train.measure(device=arguments.device)


def _tune(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """The result, and 1 where some widths got no tiles; the table is written after each pair."""
    from records.package import write_atomically
    from repro.bench import tune
    from repro.moe import tiles

    path = arguments.tiles
    if path is None:
        raise UsageError("bench tune: expected --tiles FILE, where the table is to be written, found none")
    start = _read(path) if path.exists() else None
    if start is None:
        start = tiles.Table(defaults=tiles.packaged().defaults, measured={}, places={})
    result, table = tune.measure(
        device=arguments.device,
        budget=arguments.budget,
        start=start,
        shapes=_shapes(arguments),
        done=lambda table: write_atomically(path, table.text().encode()),
    )
    write_atomically(path, table.text().encode())
    return result, int(not all(widths["kept"] for widths in result["widths"]))


def _shapes(arguments: argparse.Namespace) -> Any:
    """The shapes that --shapes names; None for all."""
    if arguments.shapes is None:
        return None
    from repro.bench.moe import CPU_SHAPES, CUDA_SHAPES

    listed = CPU_SHAPES if arguments.device == "cpu" else CUDA_SHAPES
    places = arguments.shapes.split(",")
    if not all(place.isascii() and place.isdecimal() and 1 <= int(place) <= len(listed) for place in places):
        raise UsageError(f"--shapes: expected numbers from 1 to {len(listed)} with commas, found {arguments.shapes!r}")
    return [listed[int(place) - 1] for place in places]


def _tiles(path: Path | None) -> contextlib.AbstractContextManager[None]:
    if path is None:
        return contextlib.nullcontext()
    from repro.moe import tiles

    return tiles.use(_read(path))


def _read(path: Path) -> Any:
    from repro.moe.tiles import read_table

    try:
        return read_table(path.read_text(encoding="utf-8", errors="replace"), str(path))
    except OSError as error:
        raise UsageError(f"--tiles: cannot read {path}: {error.strerror}") from error


def _show(value: Any, indent: str = "") -> None:
    """A result as indented lines: a list of objects one after the other, a spread on its line."""
    for name, item in value.items():
        if isinstance(item, dict) and set(item) == {"median", "low", "high"}:
            print(f"{indent}{name:22} {item['median']:.4g}  (quartiles {item['low']:.4g} to {item['high']:.4g})")
        elif isinstance(item, dict):
            print(f"{indent}{name}")
            _show(item, indent + "  ")
        elif isinstance(item, list):
            print(f"{indent}{name}")
            for part in item:
                _show(part, indent + "  ")
                print()
        else:
            print(f"{indent}{name:22} {item:,.4g}" if isinstance(item, float) else f"{indent}{name:22} {item}")
