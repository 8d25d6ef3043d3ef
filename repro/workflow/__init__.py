"""Plan, run, judge, bundle, verify: the only place that knows papers and records at once.

- `plan.py`: claims, arms, data, code and environment as one canonical JSON, hashed before the first step
- `run.py`, `worker.py`: the plan's segments and measures as one-thread processes, several at a time, resumable
- `evidence.py`: what a run directory or a bundle proves, every chain recomputed (no torch)
- `bundle.py`: the replication bundle, and its verification (no torch)
- `publish.py`: report.html, the index of several bundles, and the README's table; `crate.py`, `export.py`: the forms of others
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
