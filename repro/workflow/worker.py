"""The child process of a run: trains one segment or measures one arm, with one thread, and reports through a pipe."""

import contextlib
import fcntl
import itertools
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from records.errors import InternalError, InvalidError, ReproError, UsageError
from repro.checkpoint import load_final
from repro.config import decimal_string, decode
from repro.data import corpus
from repro.data.batches import Batches
from repro.environment import set_deterministic
from repro.inherit import Parent
from repro.mlp import make_model
from repro.model import ModelConfig, Transformer
from repro.trace import TraceWriter, check_chain, genesis
from repro.train import Segment, train_segment
from repro.workflow.jobs import ArmJob, SegmentJob, jobs
from repro.workflow.plan import device_of, paper_module, plan_digest

if TYPE_CHECKING:
    from repro.cluster import Cluster

_PROGRESS_SECONDS = 0.2


def main(
    plan: Mapping[str, Any],
    folder: str,
    arm: str,
    seed: int,
    segment: str | None,
    stop: int,
    pipe: Connection,
    checkpoint: Path | None,
) -> None:
    """Entry of the process: `segment` is the digest of the one to train up to the step `stop`, None to measure the arm.

    `checkpoint` is the folder of the public checkpoint that a first segment may start from.
    """

    def tell(message: tuple[Any, ...]) -> None:
        try:
            pipe.send(message)
        except BrokenPipeError:
            os._exit(1)  # the parent is gone: nobody waits for this result, and nobody is to be told

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too, and ends this process
    try:
        set_deterministic()
        job = next(job for job in jobs(plan) if job.arm == arm and job.seed == seed)
        if segment is None:
            measure(plan, Path(folder), job)
        else:
            train(plan, Path(folder), job, segment, lambda tokens: tell(("progress", tokens)), checkpoint, stop=stop)
        tell(("done",))
    except ReproError as error:
        tell(("error", type(error), str(error)))
    except OSError as error:
        tell(("error", UsageError, f"{error.strerror}: {error.filename}; mend it and go on with --resume"))
    except MemoryError:
        tell(("error", UsageError, "out of memory; go on with --resume and fewer --workers"))
    except Exception as error:  # a bug: the parent says so in one line, as the CLI does for its own
        if os.environ.get("REPRO_DEBUG"):
            raise
        tell(("error", InternalError, f"internal error: {type(error).__name__}: {error}; please report it"))
    finally:
        sys.stdout.flush()
        pipe.close()


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Holds `lock`: the worker of a killed run lives on until it finds nobody to report to, and must not write beside us."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _corpus(plan: Mapping[str, Any], name: str) -> corpus.Corpus:
    """The corpus, if it is still the one of the plan: runs over different text are never compared."""
    text = corpus.load(name)
    if text.digest != plan["corpora"][name]:
        raise InvalidError(
            f"corpus {name}: expected the digest {plan['corpora'][name][:12]}…, found {text.digest[:12]}…"
        )
    return text


class _Reached(Exception):  # noqa: N818 (no error: the stretch that was asked for is done)
    """Ends a segment's training before its end."""


def train(
    plan: Mapping[str, Any],
    folder: Path,
    job: ArmJob,
    digest: str,
    advanced: Callable[[int], None],
    checkpoint: Path | None,
    cluster: "Cluster | None" = None,
    stop: int | None = None,
) -> None:
    """Trains the segment `digest` of `job`, unless `folder` has it; `advanced` is told the tokens done now and then.

    With `stop`, training ends after that step, as an audit of the steps up to it wants.
    """
    work = next(item for item in job.segments if item.digest == digest)
    segment = decode(Segment, work.config)
    text = _corpus(plan, segment.corpus)
    sent = 0.0

    def progress(steps: int, tokens: int) -> None:
        nonlocal sent
        if time.monotonic() - sent > _PROGRESS_SECONDS:
            sent = time.monotonic()
            advanced(tokens)
        if stop is not None and stop <= steps < segment.train.steps:
            raise _Reached

    parent = next((item for item in job.segments if item.digest == work.parent), None)
    leads = cluster is None or cluster.leads
    with (
        _alone(folder / work.folder / ".lock") if leads else contextlib.nullcontext(),
        contextlib.suppress(_Reached),
    ):
        if (folder / work.folder / "final.safetensors").exists():
            return
        train_segment(
            segment,
            batches=Batches(
                data=text.train,
                batch=segment.train.batch,
                context=segment.train.context,
                seed=job.seed + segment.reseed,
                unique=segment.train.unique,
            ),
            mechanism=paper_module(plan["paper"]["slug"]).mechanism(segment.mechanism),
            seed=job.seed + segment.reseed,
            folder=folder / work.folder,
            genesis=genesis(plan_digest(plan), work.digest),
            device=cluster.device if cluster else device_of(plan),
            parent=_parent(plan, folder, parent) if parent else None,
            checkpoint_folder=checkpoint,
            progress=progress,
            cluster=cluster,
        )


def _parent(plan: Mapping[str, Any], folder: Path, job: SegmentJob) -> Parent:
    return Parent(
        folder=folder / job.folder,
        model=decode(ModelConfig, job.config["model"]),
        genesis=genesis(plan_digest(plan), job.digest),
    )


def measure(plan: Mapping[str, Any], folder: Path, job: ArmJob) -> None:
    """Measures the trained arm `job`."""
    work = job.segments[-1]
    segment = decode(Segment, work.config)
    start = genesis(plan_digest(plan), work.digest)
    trace_path = folder / work.folder / "trace.jsonl"
    entries, _ = check_chain(trace_path.read_bytes(), start, name=str(trace_path))
    if entries and entries[-1].get("type") == "diverged":
        return  # nothing to measure: the segment's own trace says that the arm diverged
    model, head = load_final(segment.model, folder / work.folder, genesis=start, device=device_of(plan))
    path = folder / job.file
    temporary = path.with_suffix(".tmp")
    held_out = _corpus(plan, segment.corpus).held_out
    module = paper_module(plan["paper"]["slug"])
    metrics = module.measure(model, job.measure, held_out)
    if hasattr(module, "measure_course"):
        course = _course(plan, folder, job)
        metrics = itertools.chain(metrics, module.measure_course(course, job.measure, held_out))
    with (
        _alone(path.with_name(f".{path.stem}.lock")),
        TraceWriter(temporary, genesis(head, job.digest)) as trace,
    ):
        for name, value in metrics:
            if not math.isfinite(value):
                trace.append({"type": "diverged", "name": name})
                break
            trace.append({"type": "metric", "name": name, "value": decimal_string(value)})
        else:
            trace.append({"type": "end", "metrics": trace.count})
        trace.sync()
        temporary.replace(path)


def _course(plan: Mapping[str, Any], folder: Path, job: ArmJob) -> list[Transformer]:
    """The model as drawn, and as each of the arm's segments left it."""
    start = decode(Segment, job.segments[0].config)
    models = [make_model(start.model, job.seed + start.reseed).to(device_of(plan))]
    for work in job.segments:
        segment, begin = decode(Segment, work.config), genesis(plan_digest(plan), work.digest)
        models.append(load_final(segment.model, folder / work.folder, genesis=begin, device=device_of(plan))[0])
    return models
