"""The command line: the only part that prints or exits.

Exit codes: 0 verified, or every judged claim replicated; 1 proven bad, or a claim not replicated; 2 usage; 3 malformed or
unsupported; 4 indeterminate; 5 network; 130 stopped by Ctrl-C.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from records.errors import ReproError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `repro` with `argv` (by default the process') and returns the exit code."""
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
        code = int(arguments.func(arguments))
        sys.stdout.flush()
        return code
    except ReproError as error:
        print(f"repro: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("repro: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None and not os.environ.get("REPRO_DEBUG"):
            # a path that no reader or writer of ours met with a line of its own
            print(f"repro: error: cannot use {error.filename}: {error.strerror}", file=sys.stderr)
            return UsageError.exit_code
        if os.environ.get("REPRO_DEBUG"):
            raise
        print(
            f"repro: internal error: {type(error).__name__}: {error} (please report it; REPRO_DEBUG=1 shows where)",
            file=sys.stderr,
        )
        return 70


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, and where to read more, instead of all of the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"repro: error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    from repro import __version__
    from repro.cli import bench, data, evaluation, evidence, export, keys, mirror, run, verify

    parser = _Parser(
        prog="repro",
        description="Reproduce Mixture-of-Experts papers, and verify what others reproduced.",
        epilog="exit codes: 0 verified or replicated, 1 proven bad or not replicated, 2 usage, 3 malformed, "
        "4 indeterminate or inconclusive, 5 network",
    )
    parser.add_argument("--version", action="version", version=f"repro {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (verify, run, export, evidence, keys, mirror, bench, data, evaluation):
        module.add_parser(commands)
    return parser
