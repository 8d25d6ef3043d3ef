"""What a plan has to be done: segments to train and arms to measure, each known by a digest of all that decides it.

- `jobs`: the plan's arms by seed, as `ArmJob` and `SegmentJob`
- `stretches`: the pieces between committed weight hashes that an audit draws from
- `stops`: the segments, and how far each, that some of these need
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from records import canonical
from repro.experiment import segment_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentJob:
    """One segment to train with one seed: its digest, its config as data, and the digest of the segment before it."""

    digest: str
    config: Mapping[str, Any]
    seed: int
    parent: str | None

    @property
    def folder(self) -> str:
        """Folder within the run directory."""
        return f"segments/{self.digest[:16]}"

    @property
    def tokens(self) -> int:
        """Tokens that the segment trains on."""
        return self.tokens_to(self.config["train"]["steps"])

    def tokens_to(self, step: int) -> int:
        """Tokens that its first `step` steps train on."""
        return int(step * self.config["train"]["batch"] * self.config["train"]["context"])


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmJob:
    """One arm with one seed: the segments it trains, in order, and the file of its measures."""

    arm: str
    seed: int
    measure: Mapping[str, Any]
    segments: tuple[SegmentJob, ...]

    @property
    def file(self) -> str:
        """File of the measures within the run directory."""
        return f"arms/{self.arm}/seed-{self.seed}.jsonl"

    @property
    def digest(self) -> str:
        """Identity of what is measured, from which the chain of its measures starts."""
        return canonical.digest({"arm": self.arm, "seed": self.seed, "measure": dict(self.measure)})


def jobs(plan: Mapping[str, Any]) -> list[ArmJob]:
    """Arms by seed: all of seed 0 first. Segments with the same digest are the same work."""
    found = []
    for seed in plan["seeds"]:
        for arm in plan["arms"]:
            parent, segments = None, []
            for config in arm["segments"]:
                digest = segment_digest(
                    config, seed=seed, corpus_sha256=plan["corpora"][config["corpus"]], parent=parent
                )
                segments.append(SegmentJob(digest=digest, config=config, seed=seed, parent=parent))
                parent = digest
            found.append(ArmJob(arm=arm["id"], seed=seed, measure=arm["measure"], segments=tuple(segments)))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """The steps of an arm's segment from one committed weight hash to the next: after `first`, up to and with `last`.

    `number` is the segment's place in the arm, from 0. To execute a stretch is to train all that lies before it, too: a
    bundle holds hashes of weights and no weights.
    """

    job: ArmJob
    number: int
    first: int
    last: int

    @property
    def segment(self) -> SegmentJob:
        """The segment that the steps are of."""
        return self.job.segments[self.number]

    @property
    def key(self) -> tuple[str, int]:
        """What two stretches share that are the same work, whichever arm they were found in."""
        return self.segment.digest, self.last


def stretches(plan: Mapping[str, Any]) -> list[Stretch]:
    """Every stretch of a plan, each once, in the order of `jobs`."""
    found: dict[tuple[str, int], Stretch] = {}
    for job in jobs(plan):
        for number, segment in enumerate(job.segments):
            steps, every = segment.config["train"]["steps"], segment.config["train"]["hash_every"]
            for first in range(0, steps, every):
                stretch = Stretch(job=job, number=number, first=first, last=min(first + every, steps))
                found.setdefault(stretch.key, stretch)
    return list(found.values())


def stops(wanted: Sequence[ArmJob], drawn: Sequence[Stretch]) -> dict[str, tuple[ArmJob, SegmentJob, int]]:
    """Segments to train for the arms and stretches, by digest: of which arm, and up to which step; parents come first."""
    found: dict[str, tuple[ArmJob, SegmentJob, int]] = {}

    def need(job: ArmJob, segment: SegmentJob, last: int) -> None:
        if segment.digest not in found or found[segment.digest][2] < last:
            found[segment.digest] = (job, segment, last)

    for job in wanted:
        for segment in job.segments:
            need(job, segment, segment.config["train"]["steps"])
    for stretch in drawn:
        for segment in stretch.job.segments[: stretch.number]:
            need(stretch.job, segment, segment.config["train"]["steps"])
        need(stretch.job, stretch.segment, stretch.last)
    return found
