"""Plan, run, judge, bundle, verify: the only place that knows papers and records at once.

- `plan.py`: claims, arms, data, code and environment as one canonical JSON, hashed before the first step; `jobs.py`,
  `estimate.py`: what is to be done for it, and what that takes; `signed.py`: a plan signed before it is run
- `run.py`, `worker.py`: the plan's segments and measures as one-thread processes, several at a time, resumable
- `evidence.py`: what a run directory or a bundle proves, every chain recomputed (no torch)
- `bundle.py`: the replication bundle, and its verification (no torch); `prove.py`: one piece of its evidence
- `audit.py`: parts of a bundle executed again; `subject.py`, `evals.py`: what `repro eval` evaluates and keeps
- `publish.py`: report.html, the index of several bundles, and the README's table; `crate.py`, `export.py`: the forms of others;
  `schemas.py`: JSON Schemas of our own
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from records.keys import KeySet
    from records.report import Verification


def verify_bundle(files: Mapping[str, bytes], *, target: str, trusted: "KeySet") -> "Verification":
    """Verification of a replication bundle's files; see `repro.workflow.bundle.verify`."""
    from repro.workflow.bundle import verify

    return verify(files, target=target, trusted=trusted)
