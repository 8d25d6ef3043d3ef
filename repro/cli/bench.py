"""`repro bench verify|moe|train|determinism`: ratios measured side by side, for people or as JSON."""

import argparse
import json
import shutil
from typing import Any

from records.errors import UsageError


def add_parser(subparsers: Any) -> None:
    """Add the command to `subparsers`."""
    command = subparsers.add_parser("bench", help="speed ratios, measured side by side in one run")
    command.add_argument("what", choices=("verify", "moe", "train", "determinism"))
    command.add_argument("--json", action="store_true", help="one JSON object with every figure and its spread")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for moe and train (default: cpu)")
    command.add_argument(
        "--python", action="append", default=[], metavar="PATH", help="determinism: also judge with this interpreter"
    )
    command.set_defaults(func=_run)


def _run(arguments: argparse.Namespace) -> int:
    for path in arguments.python:
        if shutil.which(path) is None:
            raise UsageError(f"--python: expected a Python interpreter, found no program {path!r}")
    if arguments.what == "verify":
        from repro.bench import verify

        result = verify.measure()
    else:
        from repro.environment import require_torch

        require_torch()
        if arguments.what == "determinism":
            from repro.bench import determinism

            result = determinism.measure(interpreters=arguments.python)
        elif arguments.what == "moe":
            from repro.bench import moe

            result = moe.measure(device=arguments.device)
        else:
            from repro.bench import train

            result = train.measure(device=arguments.device)
    if arguments.json:
        print(json.dumps(result))
    else:
        _show(result)
    return 0


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
