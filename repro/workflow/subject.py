"""What `repro eval` evaluates: a model of a run, or a public checkpoint, each with its tokenizer and its identity."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from records.errors import UsageError
from repro import pretrained
from repro.checkpoint import load_final, weights_digest
from repro.config import decode
from repro.data.prepare import read
from repro.data.tokens import Subwords, Tokenizer, open_tokenizer
from repro.model import Transformer
from repro.trace import genesis
from repro.train import Segment
from repro.workflow.jobs import jobs
from repro.workflow.plan import plan_digest
from repro.workflow.run import read_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model, its tokenizer, and what names it: `weights`, and the plan and segment or the checkpoint it comes from.

    `run` is the run directory that it belongs to, if it does.
    """

    model: Transformer
    tokenizer: Tokenizer
    identity: Mapping[str, str]
    run: Path | None = None


def open_subject(path: Path, *, device: str) -> Subject:
    """The model at `path`: a segment's folder of a run or the final.safetensors in it, or a checkpoint's folder.

    Raises:
        UsageError: none of these, or a checkpoint without a tokenizer.
        InvalidError: weights that are not those of the segment's trace.
        MalformedError: see `pretrained.read` and `pretrained.load`.
    """
    if path.is_dir() and (path / pretrained.CONFIG).exists():
        return _pretrained(path, device)
    folder = path if path.is_dir() else path.parent
    if not (folder / "final.safetensors").is_file() or folder.parent.name != "segments":
        raise UsageError(
            f"{path}: expected segments/…/final.safetensors of a run, or a checkpoint's folder with {pretrained.CONFIG}"
        )
    run = folder.parents[1]
    plan = read_plan(run)
    found = {job.folder: job for arm in jobs(plan) for job in arm.segments}.get(f"segments/{folder.name}")
    if found is None:
        raise UsageError(f"{folder}: no segment of the plan in {run}")
    segment = decode(Segment, found.config)
    start = genesis(plan_digest(plan), found.digest)
    model, _ = load_final(segment.model, folder, genesis=start, device=device)
    kind, _, name = segment.corpus.partition(":")
    tokenizer = read(name.partition("@")[0]).tokenizer if kind == "data" else Tokenizer()
    identity = {"weights": weights_digest(model), "plan_sha256": plan_digest(plan), "segment": found.digest}
    return Subject(model=model, tokenizer=tokenizer, identity=identity, run=run)


def _pretrained(folder: Path, device: str) -> Subject:
    found = pretrained.read(folder)
    tokenizer = Tokenizer()
    if found.tokenizer is not None:
        opened = open_tokenizer(str(folder))
        assert isinstance(opened, Subwords)
        tokenizer = opened
    elif found.model.vocab_size != tokenizer.vocab_size:
        raise UsageError(
            f"{folder}: expected {pretrained.TOKENIZER}, found none; only a vocabulary of 256 is taken for bytes"
        )
    model = Transformer(found.model, None).to(device)
    pretrained.load(found, model)
    return Subject(
        model=model, tokenizer=tokenizer, identity={"weights": weights_digest(model), "checkpoint": found.digest}
    )
