"""`repro verify --batch`: a document a line in, a JSON object a line out, in order; the summary goes to stderr."""

import argparse
import os
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from records.keys import KeySet
    from records.report import State


def run_batch(target: str, arguments: argparse.Namespace, trusted: "KeySet", max_bytes: int) -> int:
    """Verify every line of the file `target` (`-`: standard input); the exit code is the worst line's."""
    from records.bulk import verify_stream, worst
    from records.errors import UsageError
    from records.report import worst_exit_code
    from repro.cli.verify import plain

    states: Counter[State] = Counter()
    start = shown = time.monotonic()
    progress = sys.stderr.isatty()
    with ExitStack() as stack:
        if target == "-":
            stream = sys.stdin.buffer
        else:
            try:
                stream = stack.enter_context(Path(target).open("rb"))
                if stream.peek(4).startswith(b"PK\x03\x04"):
                    raise UsageError(f"{plain(target)}: expected a document a line, found a zip; leave --batch out")
            except OSError as error:
                raise UsageError(f"cannot read {plain(target)}: {error.strerror or error}") from None
        try:
            for batch in verify_stream(
                stream, trusted=trusted, name=target, workers=arguments.workers or _cores(), max_bytes=max_bytes
            ):
                sys.stdout.buffer.write(batch.output)
                states.update(batch.states)
                if progress and time.monotonic() - shown > 0.2:
                    shown = time.monotonic()
                    print(f"\r{_summary(states, shown - start)}", end="", file=sys.stderr, flush=True)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            raise UsageError(f"reading {plain(target)} or writing the results: {error.strerror or error}") from None
    sys.stdout.buffer.flush()
    print(
        f"{chr(13) if progress else ''}repro: {plain(target)}: {_summary(states, time.monotonic() - start)}",
        file=sys.stderr,
    )
    if not states:
        return 4  # nothing to check
    return worst_exit_code(worst(states, require_trusted=arguments.require == "trusted"))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _summary(states: "Counter[State]", seconds: float) -> str:
    total = states.total()
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return f"{total} targets in {seconds:.1f} s ({total / max(seconds, 1e-9):.0f}/s){': ' if counts else ''}{counts}"
