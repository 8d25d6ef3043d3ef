"""Progress of a run on stderr: bars with tokens/s and time left on a terminal, a line a finished task elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from repro.workflow.run import Reporter


@contextlib.contextmanager
def reporter() -> Iterator["Reporter"]:
    """A reporter for the stderr at hand, while the context lasts."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=30) as progress:
        yield _Bars(progress)


class _Lines:
    """For logs: one line when a task ends."""

    def __init__(self) -> None:
        self._tasks, self._finished = 0, 0
        self._tokens: dict[str, int] = {}

    def begin(self, *, tokens: int, done: int, tasks: int) -> None:
        self._tasks = tasks
        print(f"{tokens:,} tokens to train, {done:,} done before, {tasks} tasks left", file=sys.stderr)

    def started(self, task: str, tokens: int) -> None:
        self._tokens[task] = tokens

    def advanced(self, task: str, tokens: int) -> None:
        pass

    def finished(self, task: str, seconds: float) -> None:
        self._finished += 1
        tokens = self._tokens.pop(task)
        rate = f", {tokens / seconds:,.0f} tokens/s" if tokens else ""
        print(f"[{self._finished}/{self._tasks}] {task}: {seconds:.1f} s{rate}", file=sys.stderr)


class _Bars:
    """For terminals: a bar for the whole run and one for each task under way."""

    def __init__(self, progress: "Progress") -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}
        self._done: dict[str, int] = {}
        self._finished_tokens = 0

    def begin(self, *, tokens: int, done: int, tasks: int) -> None:
        self._started_at = time.monotonic()
        self._before = self._finished_tokens = done
        self._all = self._progress.add_task("all arms", total=tokens, completed=done, rate="")

    def started(self, task: str, tokens: int) -> None:
        self._bars[task] = self._progress.add_task(f"  {task}", total=tokens or None, rate="")
        self._began[task], self._done[task] = time.monotonic(), 0

    def advanced(self, task: str, tokens: int) -> None:
        self._done[task] = tokens
        seconds = time.monotonic() - self._began[task]
        self._progress.update(self._bars[task], completed=tokens, rate=f"{tokens / seconds:,.0f} tokens/s")
        self._draw_total()

    def finished(self, task: str, seconds: float) -> None:
        bar = self._bars.pop(task)
        total = next(item.total for item in self._progress.tasks if item.id == bar)
        self._finished_tokens += int(total or 0)
        del self._done[task]
        self._progress.remove_task(bar)
        self._draw_total()

    def _draw_total(self) -> None:
        done = self._finished_tokens + sum(self._done.values())
        rate = (done - self._before) / max(time.monotonic() - self._started_at, 1e-9)
        self._progress.update(self._all, completed=done, rate=f"{rate:,.0f} tokens/s")
