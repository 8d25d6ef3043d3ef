"""Commands over a bundle's evidence: prove."""

import argparse
from pathlib import Path
from typing import Any

Subparsers = Any  # argparse gives this type no public name

# Imports lie inside the commands: `repro verify` builds this parser too, and must start in milliseconds.


def add_parser(commands: Subparsers) -> None:
    """Adds the commands to `commands`."""
    command = commands.add_parser("prove", help="one piece of a bundle's evidence, checkable without the rest")
    command.add_argument("file", type=Path, metavar="FILE", help="a replication bundle (zip or folder)")
    command.add_argument("--arm", required=True, metavar="ID")
    command.add_argument("--seed", type=int, required=True, metavar="N")
    command.add_argument(
        "--step", type=int, metavar="S", help="the piece of the trace that this step lies in (default: the measures)"
    )
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    command.set_defaults(func=_prove)


def _prove(arguments: argparse.Namespace) -> int:
    from records.keys import pinned
    from records.package import read_bundle, write_atomically
    from repro.workflow import prove
    from repro.workflow.bundle import sound

    files = read_bundle(arguments.file)
    sound(files, target=str(arguments.file), trusted=pinned())
    data = prove.prove(files, arm=arguments.arm, seed=arguments.seed, step=arguments.step)
    write_atomically(arguments.output, data)
    found = prove.verify(data, trusted=pinned())
    whose = [check.detail for check in found.checks if check.code == "trace"][-1]
    whole = sum(len(data) for data in files.values())
    print(f"{arguments.output}: {whose}; {len(data):,} bytes where the bundle has {whole:,}")
    return 0
