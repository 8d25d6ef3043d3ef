"""A plan's segments and measures, each in a process of its own with one thread, several at a time.

- `start`: makes or reopens a run directory; a directory belongs to one plan, and to one run at a time
- `execute`: trains every segment once, measures every arm, in dependency order; what is finished is not done again
- `execute_together`: the same under torchrun, where all processes train one segment at a time
- `finish`: judges, and writes outcome.json

A worker that dies, Ctrl-C or a full disk lose nothing but the steps since the last checkpoint.
"""

import contextlib
import datetime
import fcntl
import multiprocessing
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from records import canonical
from records.errors import InvalidError, MalformedError, ReproError, UsageError
from records.package import write_atomically
from repro.environment import code_state
from repro.judge import judge
from repro.workflow.evidence import load, read_directory
from repro.workflow.jobs import ArmJob, SegmentJob, Stretch, jobs, stops
from repro.workflow.plan import parse_plan, plan_digest

if TYPE_CHECKING:
    from repro.cluster import Cluster

RUN_SCHEMA = "repro.run/v1"


class Reporter(Protocol):
    """Is told what happens during a run; the CLI draws it."""

    def begin(self, *, tokens: int, done: int, tasks: int) -> None:
        """Tokens to train in all, tokens already done, tasks (segments and measures) left."""

    def started(self, task: str, tokens: int) -> None:
        """A task began; `tokens` is 0 for a measure."""

    def advanced(self, task: str, tokens: int) -> None:
        """Tokens of the task done so far."""

    def finished(self, task: str, seconds: float) -> None:
        """A task ended after so many seconds."""


class _Mute:
    """The reporter of a process that is not the first."""

    def begin(self, *, tokens: int, done: int, tasks: int) -> None:
        """Nothing."""

    def started(self, task: str, tokens: int) -> None:
        """Nothing."""

    def advanced(self, task: str, tokens: int) -> None:
        """Nothing."""

    def finished(self, task: str, seconds: float) -> None:
        """Nothing."""


def read_plan(folder: Path) -> dict[str, Any]:
    """The plan of a run directory.

    Raises:
        UsageError: no run directory.
        MalformedError: plan.json is not a plan in canonical form.
    """
    try:
        data = (folder / "plan.json").read_bytes()
    except OSError as error:
        raise UsageError(f"{folder}: expected a run directory with a plan.json ({error.strerror})") from error
    return parse_plan(data, name=str(folder / "plan.json"))


@contextlib.contextmanager
def start(
    plan: Mapping[str, Any], folder: Path, *, resume: bool, beside: Mapping[str, bytes] | None = None
) -> Iterator[None]:
    """Holds the run directory `folder` for `plan` while the context lasts; a new one gets the files `beside`, too.

    Raises:
        UsageError: the folder holds a run and `resume` is not asked for, holds another plan's run or other files, is in
            use by another process, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "plan.json").exists():
            ours = {".lock", *(beside or {})}  # what a start that was killed leaves, and files on their way
            foreign = sorted(path.name for path in folder.iterdir() if path.name not in ours and path.suffix != ".part")
            if foreign:
                raise UsageError(
                    f"{folder}: expected no folder, an empty one or a run, found {foreign[0]!r}; choose another --out"
                )
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}; choose another --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"{folder} is in use by another run; wait for it, or choose another --out") from error
        if (folder / "plan.json").exists():
            found = plan_digest(read_plan(folder))
            if not resume:
                raise UsageError(f"{folder} holds a run already; go on with --resume, or choose another --out")
            if found != plan_digest(plan):
                raise UsageError(
                    f"{folder} holds a run of another plan (expected {plan_digest(plan)[:12]}, found {found[:12]}): "
                    "claims, seeds, code, corpus or environment differ; choose another --out"
                )
        else:
            for name, data in (beside or {}).items():
                write_atomically(folder / name, data)
            write_atomically(folder / "plan.json", canonical.dumps(dict(plan)))
        yield


def execute(
    plan: Mapping[str, Any], folder: Path, *, workers: int, reporter: Reporter, checkpoint: Path | None = None
) -> None:
    """Trains and measures all that the plan asks for and `folder` lacks.

    `checkpoint` is the folder of the public checkpoint that the plan names by its digest, if it does.

    Raises:
        ReproError: a task failed; the others were stopped, and a run with `resume` goes on from there.
    """
    began = now()
    _write_run_record(folder, started_at=began, finished_at=None)
    execute_jobs(plan, folder, jobs(plan), workers=workers, reporter=reporter, checkpoint=checkpoint)
    _write_run_record(folder, started_at=began, finished_at=now())


def execute_jobs(
    plan: Mapping[str, Any],
    folder: Path,
    wanted: Sequence[ArmJob],
    *,
    drawn: Sequence[Stretch] = (),
    workers: int,
    reporter: Reporter,
    checkpoint: Path | None = None,
) -> None:
    """Trains and measures the `wanted` arms of a plan as far as `folder` lacks them, and trains up to `drawn` stretches.

    Raises what `execute` does.
    """
    tasks = _open_tasks(wanted, drawn, folder)
    total = sum(segment.tokens_to(steps) for _, segment, steps in stops(wanted, drawn).values())
    left = sum(task.tokens for task in tasks)
    reporter.begin(tokens=total, done=total - left, tasks=len(tasks))
    _Pool(plan, folder, workers=workers, reporter=reporter, checkpoint=checkpoint).run(tasks)


def execute_together(
    plan: Mapping[str, Any],
    folder: Path,
    *,
    cluster: "Cluster",
    reporter: Reporter | None,
    checkpoint: Path | None = None,
) -> None:
    """As `execute`, one task after the other, each on all the processes of `cluster`; every one of them calls this.

    Only the first one has a `reporter`.

    Raises:
        ReproError: a task failed; torchrun stops the other processes, and a run with `resume` goes on from there.
    """
    from repro.workflow import worker

    began = now()
    wanted = jobs(plan)
    # What is there is looked up once: the processes may see a shared folder change at different times.
    open_tasks = cluster.told(
        [
            (task.job.arm, task.job.seed, task.segment.digest if task.segment else None)
            for task in _open_tasks(wanted, (), folder)
        ]
        if cluster.leads
        else None
    )
    by_arm = {(job.arm, job.seed): job for job in wanted}
    segments = {segment.digest: segment for job in wanted for segment in job.segments}
    total = sum(segment.tokens for segment in segments.values())
    left = sum(segments[digest].tokens for _, _, digest in open_tasks if digest)
    reporter = reporter or _Mute()
    if cluster.leads:
        _write_run_record(folder, started_at=began, finished_at=None)
        reporter.begin(tokens=total, done=total - left, tasks=len(open_tasks))
    for arm, seed, digest in open_tasks:
        name = f"{arm} seed {seed}" if digest else f"measure {arm} seed {seed}"
        since = time.monotonic()
        reporter.started(name, segments[digest].tokens if digest else 0)
        if digest:
            worker.train(plan, folder, by_arm[arm, seed], digest, partial(reporter.advanced, name), checkpoint, cluster)
        elif cluster.leads:
            worker.measure(plan, folder, by_arm[arm, seed])
        cluster.wait()
        reporter.finished(name, time.monotonic() - since)
    if cluster.leads:
        _write_run_record(folder, started_at=began, finished_at=now())


def finish(plan: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Judges the run directory's evidence and writes outcome.json; returns the outcome.

    Raises:
        InvalidError: a chain of the evidence does not hold.
    """
    loaded = load(plan, read_directory(folder))
    if loaded.faults:
        raise InvalidError(f"{folder}: {loaded.faults[0]}")
    outcome = {"plan_sha256": plan_digest(plan)} | judge(plan, loaded.evidence)
    write_atomically(folder / "outcome.json", canonical.dumps(outcome))
    return outcome


def now() -> str:
    """The UTC time, as records state it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _write_run_record(folder: Path, *, started_at: str, finished_at: str | None) -> None:
    """What is true of this execution only: when, from which checkout, on what; a resumed run keeps its sessions."""
    path = folder / "run.json"
    sessions = []
    if path.exists():
        try:
            sessions = [s for s in canonical.loads(path.read_bytes())["sessions"] if s["started_at"] != started_at]
        except (ReproError, KeyError, TypeError) as error:
            raise MalformedError(f"{path}: expected the record of a run; delete it to go on") from error
    sessions.append({"started_at": started_at, "finished_at": finished_at})
    record = {
        "schema": RUN_SCHEMA,
        "sessions": sessions,
        "code": code_state(),
        "python": platform.python_version(),
        "cores": os.cpu_count() or 1,
    }
    write_atomically(path, canonical.dumps(record))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """One process: train a segment (`segment` set) or measure an arm (`segment` None)."""

    name: str
    job: ArmJob
    segment: SegmentJob | None
    needs: str | None
    stop: int = 0  # the step to end a segment's training after; a whole segment's is its last

    @property
    def key(self) -> str:
        return self.segment.digest if self.segment else self.job.file

    @property
    def tokens(self) -> int:
        return self.segment.tokens_to(self.stop) if self.segment else 0


def _open_tasks(wanted: Sequence[ArmJob], drawn: Sequence[Stretch], folder: Path) -> list[_Task]:
    """Tasks not yet done, each once, in the order of the jobs."""
    tasks: dict[str, _Task] = {}
    for digest, (job, segment, stop) in stops(wanted, drawn).items():
        if not (folder / segment.folder / "final.safetensors").exists():
            number = job.segments.index(segment)
            suffix = f" part {number + 1}" if len(job.segments) > 1 else ""
            name = f"{job.arm}{suffix} seed {job.seed}"
            tasks[digest] = _Task(name=name, job=job, segment=segment, needs=segment.parent, stop=stop)
    for job in wanted:
        if not (folder / job.file).exists():
            tasks[job.file] = _Task(
                name=f"measure {job.arm} seed {job.seed}", job=job, segment=None, needs=job.segments[-1].digest
            )
    return list(tasks.values())


class _Stop:
    """Notes Ctrl-C until it is looked for: raised at any moment, it can be lost in a callback of the process machinery."""

    def __init__(self) -> None:
        self.asked = False
        in_main = threading.current_thread() is threading.main_thread()
        self._before = signal.signal(signal.SIGINT, self._note) if in_main else None

    def _note(self, *_: object) -> None:
        self.asked = True

    def close(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


class _Pool:
    """Runs tasks in forked or spawned processes, one pipe each, so that no lock is shared with one that dies."""

    def __init__(
        self, plan: Mapping[str, Any], folder: Path, *, workers: int, reporter: Reporter, checkpoint: Path | None
    ) -> None:
        methods = multiprocessing.get_all_start_methods()
        # The fork server has torch loaded already: a new process costs milliseconds, not the seconds of the import.
        self._context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            self._context.set_forkserver_preload(["repro.workflow.preload"])
        self._plan, self._folder, self._workers, self._reporter = dict(plan), folder, workers, reporter
        self._checkpoint = checkpoint
        self._running: dict[Connection, tuple[BaseProcess, _Task, float]] = {}

    def run(self, tasks: list[_Task]) -> None:
        waiting = {task.key: task for task in tasks}
        unfinished = set(waiting)
        threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        os.environ.update(dict.fromkeys(threads, "1"))  # read by the libraries when the fork server loads them
        stop = _Stop()
        try:
            while waiting or self._running:
                if stop.asked:
                    raise KeyboardInterrupt
                ready = [task for task in waiting.values() if task.needs not in unfinished]
                ready.sort(key=lambda task: task.segment is not None)  # measures first: they are short and free memory
                for task in ready[: self._workers - len(self._running)]:
                    self._begin(waiting.pop(task.key))
                for connection in wait(list(self._running), timeout=0.2):
                    assert isinstance(connection, Connection)
                    self._receive(connection, unfinished)
        finally:
            stop.close()
            for process, _, _ in self._running.values():
                process.kill()
            for process, _, _ in self._running.values():
                process.join()
            for name, value in threads.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value

    def _begin(self, task: _Task) -> None:
        from repro.workflow import worker

        ours, theirs = self._context.Pipe(duplex=False)
        digest = task.segment and task.segment.digest
        place = (task.job.arm, task.job.seed, digest, task.stop)
        arguments = (self._plan, str(self._folder), *place, theirs, self._checkpoint)
        process = self._context.Process(target=worker.main, args=arguments, name=task.name, daemon=True)  # type: ignore[attr-defined]
        try:
            process.start()
        except (EOFError, ConnectionError) as error:
            raise UsageError(
                f"{task.name}: the process that starts the others died (out of memory?); go on with --resume"
            ) from error
        theirs.close()
        self._running[ours] = (process, task, time.monotonic())
        self._reporter.started(task.name, task.tokens)

    def _receive(self, connection: Connection, unfinished: set[str]) -> None:
        process, task, began = self._running[connection]
        try:
            message = connection.recv()
        except EOFError:
            del self._running[connection]
            process.join()
            code = process.exitcode
            how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            raise UsageError(
                f"{task.name}: its process died ({how}; out of memory?); go on with --resume, fewer --workers need less memory"
            ) from None
        if message[0] == "progress":
            self._reporter.advanced(task.name, message[1])
            return
        del self._running[connection]
        connection.close()
        process.join()
        if message[0] == "error":
            raise message[1](f"{task.name}: {message[2]}")
        unfinished.discard(task.key)
        self._reporter.finished(task.name, time.monotonic() - began)
