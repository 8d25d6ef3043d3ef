"""`repro eval`: benchmarks and held-out text for a trained model or a public checkpoint, at any number of experts."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repro.cli.run import positive

Subparsers = Any  # argparse gives this type no public name


def add_parser(commands: Subparsers) -> None:
    """Adds the command to `commands`."""
    command = commands.add_parser("eval", help="benchmarks through lm-eval, at any number of experts a token")
    command.add_argument(
        "checkpoint",
        type=Path,
        nargs="+",
        metavar="CHECKPOINT",
        help="segments/…/final.safetensors of a run, or the folder of a public checkpoint",
    )
    command.add_argument(
        "--tasks",
        required=True,
        metavar="TASKS",
        help="comma-separated: gsm8k=FILE[+EXAMPLES], humaneval=FILE, text=PATH, held_out=CORPUS, or names of lm-eval's "
        "tasks (arc_easy, gsm8k, …), which need the hub",
    )
    command.add_argument("--k", metavar="KS", help="comma-separated experts a token (default: the model's own)")
    command.add_argument("--limit", type=positive, metavar="N", help="first N documents of each task")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command.add_argument(
        "--unsafe-code", action="store_true", help="run the code that the model writes (humaneval); only in a container"
    )
    command.add_argument("--record", action="store_true", help="keep the results in the run, for its bundle")
    command.add_argument("--json", action="store_true", help="one JSON object a checkpoint")
    command.set_defaults(func=_eval)


def _eval(arguments: argparse.Namespace) -> int:
    from records import canonical
    from records.errors import UsageError
    from repro.config import encode
    from repro.environment import numeric_environment, set_deterministic

    environment = numeric_environment(arguments.device)
    from repro.evals.harness import evaluate, require_lm_eval

    require_lm_eval()
    from repro.evals.tasks import parse
    from repro.workflow.evals import record
    from repro.workflow.subject import open_subject

    words = [word.strip() for word in arguments.k.split(",")] if arguments.k else []
    if not all(word.isdecimal() for word in words):
        raise UsageError(f"--k: expected whole numbers separated by commas, found {arguments.k!r}")
    tasks = parse(arguments.tasks, unsafe_code=arguments.unsafe_code)
    set_deterministic()
    ks: list[int | None] = [int(word) for word in words] or [None]
    for path in arguments.checkpoint:
        subject = open_subject(path, device=arguments.device)
        if arguments.record and subject.run is None:
            raise UsageError("--record: a public checkpoint belongs to no run; leave it out")
        found = evaluate(subject.model, subject.tokenizer, tasks, ks=ks, limit=arguments.limit)
        result = {**subject.identity, "environment": encode(environment), **found}
        if arguments.record and subject.run is not None:
            print(f"kept in {record(subject.run, result)}", file=sys.stderr)
        if arguments.json:
            sys.stdout.buffer.write(canonical.dumps(result) + b"\n")
            sys.stdout.flush()
        else:
            _show(path, result)
    if not arguments.json and any(task.name == "humaneval" and not task.unsafe for task in tasks):
        print("humaneval: no code was run; --unsafe-code adds pass@1")
    return 0


def _show(path: Path, result: Mapping[str, Any]) -> None:
    print(f"{path}\n  weights {result['weights']}")
    for row in result["results"]:
        k = f"k'={row['k']}" if row["k"] is not None else ""
        for name, value in row["metrics"].items():
            print(f"  {row['task']:18} {k:6} {name:30} {float(value):.6g}  ({row['documents']} documents)")
