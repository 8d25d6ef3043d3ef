"""The plan: everything that decides a run, as one canonical JSON whose digest is in all that follows.

- `make_plan`: paper, scale, seeds and claims to a plan; reads the corpora to digest them, trains nothing
- `parse_plan`: foreign bytes to a plan, its form checked
- `plan_digest`, `at_hand`, `device_of`, `reuse`: what names a plan, whether and where it can be run, and how often it reads
  its text
- `paper_module`: the paper's package, with what the workflow asks of it
"""

import hashlib
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from records import canonical
from records.errors import MalformedError, UsageError
from records.versions import check_version
from repro.config import decode, encode
from repro.data import corpus
from repro.environment import NumericEnvironment, code_state, numeric_environment
from repro.experiment import (
    SCALES,
    Arm,
    Claim,
    Design,
    Deviation,
    Figure,
    Group,
    PaperInfo,
    load_claims,
    select_claims,
    slug_of,
)
from repro.pretrained import NOT_AT_HAND

PLAN_SCHEMA = "repro.plan/v1"
_ARM_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_TRAIN_COUNTS = ("steps", "batch", "context", "trace_every", "hash_every")
_MODEL_COUNTS = ("num_experts", "num_layers", "dense_layers")

# How far a traced loss (nats/token) may lie from this run's where the NumericEnvironment differs, so that weights
# cannot be bitwise equal: over four times the common seed-to-seed sd at nano, where another seed differs in all.
LOSS_TOLERANCE = 0.08


class PaperModule(Protocol):
    """What a paper's package offers beside its claims.toml.

    A paper that compares the model before, between and after an arm's segments offers `measure_course(models, config,
    held_out)` beside `measure`: `models` are the one that the first segment starts from, as drawn, and the trained ones of
    every segment in order. It gives its metrics after those of `measure`.
    """

    def design(self, scale: str) -> Design:
        """Arms, groups and figures at `scale`.

        A paper that trains public checkpoints further has a second parameter, `checkpoint`: a `repro.pretrained.Pretrained`,
        or None where none is at hand.
        """

    def mechanism(self, config: Mapping[str, Any]) -> Any:
        """The `repro.train.Mechanism` that a segment's mechanism data describe."""

    def measure(self, model: Any, config: Mapping[str, Any], held_out: corpus.Bytes) -> Iterator[tuple[str, float]]:
        """Metrics of a trained model, by name."""


def paper_module(slug: str) -> PaperModule:
    """The package papers.`slug`; raises UsageError for a slug that is none of ours, as a foreign plan may hold."""
    module: PaperModule = importlib.import_module(f"papers.{slug_of(slug)}")
    return module


def make_plan(
    paper: str,
    *,
    scale: str,
    seeds: int | None = None,
    claims: str | None = None,
    device: str = "cpu",
    checkpoint: Path | None = None,
    dry: bool = False,
    layout: str = "one process",
) -> dict[str, Any]:
    """The plan, as the contents of plan.json.

    Args:
        paper: slug, with - or _.
        scale: smoke, nano, small, base or paper.
        seeds: number of seeds, counted from the design's first; by default the paper's own for the scale.
        claims: comma-separated ids or suites, whose arms alone are run; by default all claims but those that are
            left out at this scale unless named. Where those of the default are all there, so are the arms that no claim
            speaks of.
        device: cpu or cuda.
        checkpoint: folder of the public checkpoint to start from, where the paper's design does.
        dry: do with corpora and a checkpoint that are not at hand, with `NOT_AT_HAND` for a digest: enough for the cost.
        layout: how a model lies on the processes that train it; see `repro.cluster.Layout`.

    Raises:
        UsageError: unknown paper, scale, claim or device, a bad number of seeds, a missing extra, or a corpus or
            checkpoint that is not at hand.
    """
    info = load_claims(paper)
    slug = slug_of(paper)
    if scale not in SCALES:
        raise UsageError(f"unknown scale {scale!r}: expected one of {', '.join(SCALES)}")
    if seeds is not None and seeds < 1:
        raise UsageError(f"seeds: expected at least 1, found {seeds}")
    selected = select_claims(info, claims, scale)
    environment = numeric_environment(device, layout)
    design = _design(paper_module(slug), scale, checkpoint, dry=dry)
    left_out = tuple(claim for claim in info.claim if claim not in selected)
    own = [claim for claim in info.claim if scale not in claim.only_named]
    arms, groups, figures = _needed(
        design, selected, left_out, partly=not own or any(claim in left_out for claim in own)
    )
    corpora = _corpora(arms, dry=dry)
    if all(digest != NOT_AT_HAND for digest in corpora.values()):
        _check_supply(arms)
        _check_vocabulary(arms, checkpoint)
    code = code_state()
    plan: dict[str, Any] = encode(
        {
            "schema": PLAN_SCHEMA,
            "paper": info.paper,
            "scale": scale,
            "seeds": list(range(design.first_seed, design.first_seed + (seeds or design.seeds))),
            "claims": selected,
            "claims_left_out": [claim.id for claim in left_out],
            "arms": arms,
            "groups": groups,
            "figures": figures,
            "deviations": info.deviation,
            "warnings": design.warnings,
            "corpora": corpora,
            "code": {"sha256": code["sha256"], "version": code["version"]},
            "environment": environment,
            "tolerance": {"loss": LOSS_TOLERANCE},
        }
    )
    return plan


def _design(module: PaperModule, scale: str, checkpoint: Path | None, *, dry: bool) -> Design:
    if "checkpoint" not in inspect.signature(module.design).parameters:
        if checkpoint:
            raise UsageError("this paper starts from no checkpoint: leave --checkpoint out")
        return module.design(scale)
    from repro import pretrained

    found = pretrained.read(checkpoint) if checkpoint else None
    design: Design = module.design(scale, checkpoint=found)  # type: ignore[call-arg]
    wanted = {segment.checkpoint for arm in design.arms for segment in arm.segments} - {None}
    if found and found.digest not in wanted:
        raise UsageError(f"no arm at scale {scale} starts from a checkpoint: leave --checkpoint out")
    if NOT_AT_HAND in wanted and not dry:
        raise UsageError(f"scale {scale} trains a public checkpoint further: say where it lies with --checkpoint DIR")
    return design


def _corpora(arms: Sequence[Arm], *, dry: bool) -> dict[str, str]:
    """Digest of every corpus by name."""
    digests = {}
    for name in sorted({segment.corpus for arm in arms for segment in arm.segments}):
        try:
            digests[name] = corpus.load(name).digest
        except corpus.NotPreparedError:
            if not dry:
                raise
            digests[name] = NOT_AT_HAND
    return digests


def at_hand(plan: Mapping[str, Any]) -> bool:
    """Whether all that the plan starts from was there when it was made."""
    checkpoints = [segment.get("checkpoint") for arm in plan["arms"] for segment in arm["segments"]]
    return NOT_AT_HAND not in (*plan["corpora"].values(), *checkpoints)


def _check_vocabulary(arms: Sequence[Arm], checkpoint: Path | None) -> None:
    """Every corpus has no more tokens than its model, and those of the checkpoint's own tokenizer where it has one."""
    from repro.pretrained import TOKENIZER

    path = checkpoint / TOKENIZER if checkpoint else None
    own = hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else None
    segments = [segment for arm in arms for segment in arm.segments]
    # a classifier reads any byte, and predicts classes alone
    sizes = [256 if s.model.kind == "mlp" else s.model.vocab_size for s in segments]
    uses = {(s.corpus, size, s.checkpoint is not None) for s, size in zip(segments, sizes, strict=True)}
    for name, vocab_size, further in sorted(uses):
        text = corpus.load(name)
        if further and own and text.tokenizer_sha256 != own:
            raise UsageError(
                f"corpus {name}: expected tokens of the checkpoint's {TOKENIZER} ({own[:12]}…), found those of "
                f"{(text.tokenizer_sha256 or 'bytes')[:12]}; prepare it with --tokenizer {checkpoint}"
            )
        if text.vocab_size > vocab_size:
            raise UsageError(
                f"corpus {name}: expected at most the model's {vocab_size} different tokens, found {text.vocab_size}"
            )


def _check_supply(arms: Sequence[Arm]) -> None:
    from repro.data.batches import check_supply  # brings torch, which whoever only reads plans has no need of

    for arm in arms:
        for segment in arm.segments:
            train = segment.train
            if train.unique or train.epochs:
                check_supply(
                    tokens=(train.first_step + train.steps) * train.batch * train.context,
                    context=train.context,
                    available=len(corpus.load(segment.corpus).train),
                    unique=train.unique,
                    epochs=train.epochs,
                    name=f"arm {arm.id}, corpus {segment.corpus}",
                )


def device_of(plan: Mapping[str, Any]) -> str:
    """cpu or cuda: where the plan is to be executed."""
    return "cpu" if plan["environment"]["device"] == "cpu" else "cuda"


def reuse(plan: Mapping[str, Any]) -> dict[str, tuple[int, float]]:
    """Unique tokens and epochs of them that each arm trains on, for those arms whose unique tokens the plan fixes."""
    found = {}
    for arm in plan["arms"]:
        train = arm["segments"][-1]["train"]
        if unique := train.get("unique", 0):
            steps = train.get("first_step", 0) + train["steps"]
            found[arm["id"]] = (unique, steps * train["batch"] * train["context"] / unique)
    return found


def plan_digest(plan: Mapping[str, Any]) -> str:
    """SHA-256 of the plan's canonical JSON, which is also that of the file plan.json."""
    return canonical.digest(plan)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ArmRecord:
    id: str
    label: str
    segments: tuple[Mapping[str, Any], ...]
    measure: Mapping[str, Any]
    measure_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Deviates:
    """From which signed plan a plan deviates, in what, and why."""

    plan_sha256: str
    why: str
    differing: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _PlanRecord:
    """The form of plan.json: what `parse_plan` holds a foreign plan against."""

    schema: str
    paper: PaperInfo
    scale: str
    seeds: tuple[int, ...]
    claims: tuple[Claim, ...]
    claims_left_out: tuple[str, ...]
    arms: tuple[_ArmRecord, ...]
    groups: tuple[Group, ...]
    figures: tuple[Figure, ...]
    deviations: tuple[Deviation, ...]
    corpora: Mapping[str, Any]
    code: Mapping[str, Any]
    environment: NumericEnvironment
    tolerance: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    deviates: _Deviates | None = None


def parse_plan(data: bytes, *, name: str) -> dict[str, Any]:
    """The plan in `data`, with its form checked as far as anything here relies on it.

    Raises:
        MalformedError: not canonical JSON, another version, or a field that is missing or of another type.
    """
    plan = canonical.loads(data)
    if not isinstance(plan, dict):
        raise MalformedError(f"{name}: expected a plan of the form {PLAN_SCHEMA}, found {type(plan).__name__}")
    check_version(plan.get("schema"), PLAN_SCHEMA, what=f"{name}: expected a plan of the form")
    if canonical.dumps(plan) != data:
        raise MalformedError(f"{name}: expected canonical JSON; a plan is never written by hand")
    record = decode(_PlanRecord, plan, where=name)
    if len(set(record.seeds)) < len(record.seeds) or not record.seeds:
        raise MalformedError(f"{name}: expected at least one seed and none twice, found {list(record.seeds)}")
    for arm in record.arms:
        if not _ARM_ID.fullmatch(arm.id):
            raise MalformedError(
                f"{name}: expected arm ids of letters, digits, '.', '_' and '-', found {arm.id[:60]!a}"
            )
        if not arm.segments:
            raise MalformedError(f"{name}: arm {arm.id} has no segments")
        for segment in arm.segments:
            train = segment.get("train")
            counts = [train.get(field) for field in _TRAIN_COUNTS] if isinstance(train, dict) else [None]
            if not all(type(count) is int and count > 0 for count in counts):
                raise MalformedError(
                    f"{name}: arm {arm.id}: expected {', '.join(_TRAIN_COUNTS)} under train, all positive"
                )
            if isinstance(train, dict) and train.get("probe_every", 0) != 0 and not _can_be_probed(segment):
                raise MalformedError(
                    f"{name}: arm {arm.id}: expected a positive train.probe_every, and {', '.join(_MODEL_COUNTS)} under model"
                )
            name_of_corpus = segment.get("corpus")
            if not isinstance(name_of_corpus, str) or not isinstance(record.corpora.get(name_of_corpus), str):
                raise MalformedError(f"{name}: arm {arm.id}: expected a corpus that the plan gives a digest of")
    if not isinstance(record.code.get("sha256"), str):
        raise MalformedError(f"{name}: expected the code's digest under code.sha256")
    return plan


def _can_be_probed(segment: Mapping[str, Any]) -> bool:
    model = segment.get("model")
    counts = [
        segment["train"]["probe_every"],
        *((model.get(field) for field in _MODEL_COUNTS) if isinstance(model, dict) else [None]),
    ]
    return all(type(count) is int and count >= 0 for count in counts)


def _needed(
    design: Design, claims: tuple[Claim, ...], left_out: tuple[Claim, ...], *, partly: bool
) -> tuple[tuple[Arm, ...], tuple[Group, ...], tuple[Figure, ...]]:
    """Arms, groups and figures of `claims`, and, unless these are the scale's own claims only `partly`, those that no claim
    speaks of."""
    wanted = {name for claim in claims for name in claim.arms}
    elsewhere = {name for claim in left_out for name in claim.arms}
    suites = {claim.suite for claim in claims} - {claim.suite for claim in left_out}
    for figure in design.figures:
        if figure.suite:
            (wanted if figure.suite in suites else elsewhere).update(figure.arms)
    if not partly:
        wanted |= {group.id for group in design.groups} - elsewhere
    groups = tuple(group for group in design.groups if group.id in wanted)
    names = wanted | {arm for group in groups for arm in group.among}
    if not partly:
        elsewhere |= {arm for group in design.groups if group.id in elsewhere for arm in group.among}
        names |= {arm.id for arm in design.arms} - elsewhere
    arms = tuple(arm for arm in design.arms if arm.id in names)
    figures = tuple(figure for figure in design.figures if figure.arms <= names)
    return arms, groups, figures
