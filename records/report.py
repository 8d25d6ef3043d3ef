"""What a verification found: checks, one state computed from them, and the JSON object that `--json` prints.

`Checks` collects them while a document is gone through.
A `Verification` is immutable; whoever knows more appends to it with `with_checks`, and the state follows.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from records.fields import shown

Status = Literal["pass", "fail", "skip"]
State = Literal["trusted", "valid", "invalid", "malformed", "indeterminate"]
Kind = Literal[
    "pith_record",
    "pith_bundle",
    "pith_state",
    "replication_bundle",
    "inclusion_proof",
    "audit_statement",
    "signed_plan",
]
Source = Literal["pinned", "file", "document", "none"]

SCHEMA: Final = "repro.verify/v1"
EXIT_CODES: Final[dict[State, int]] = {"trusted": 0, "valid": 0, "invalid": 1, "malformed": 3, "indeterminate": 4}
#: From best to worst, for the one code of a run over many targets.
SEVERITY: Final = (0, 4, 5, 3, 1)
#: How many checks of one code and status are listed.
MAX_ALIKE: Final = 20

_MALFORMED: Final = frozenset({"strict_json", "schema"})
#: A document of this kind is `valid` only when one of these checks passed: without it nothing was shown.
_PROOF: Final[dict[Kind, frozenset[str]]] = {
    "pith_record": frozenset({"canonical_hash", "pith_number"}),
    "pith_bundle": frozenset({"canonical_hash", "pith_number"}),
    "pith_state": frozenset({"canonical_hash", "pith_number"}),
    "replication_bundle": frozenset({"verdicts"}),
    "inclusion_proof": frozenset({"evidence_tree"}),
    "audit_statement": frozenset({"envelope_signature"}),
    "signed_plan": frozenset({"envelope_signature"}),
}
_SIGNED: Final = frozenset({"receipt_signature", "envelope_signature"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One check: its code (docs/architecture.md lists them), how it went, and one line that says what was compared."""

    code: str
    status: Status
    detail: str = ""


class Checks:
    """Collects checks: every fault is kept, not just the first, and of many alike the first `MAX_ALIKE` and their number."""

    def __init__(self) -> None:
        self.found: list[Check] = []
        self._counts: Counter[tuple[str, Status]] = Counter()

    def add(self, code: str, status: Status, detail: str) -> None:
        """One more check."""
        self._counts[code, status] += 1
        if self._counts[code, status] <= MAX_ALIKE:
            self.found.append(Check(code=code, status=status, detail=detail))

    def all(self) -> tuple[Check, ...]:
        """The checks that are listed, and how many more of each code and status there are."""
        more = (
            Check(code=code, status=status, detail=f"and {count - MAX_ALIKE} more, not listed")
            for (code, status), count in self._counts.items()
            if count > MAX_ALIKE
        )
        return (*self.found, *more)

    def same(self, code: str, what: str, found: Any, expected: Any) -> bool:
        """Compare a stated value with what follows from the hashed record; only a difference is reported."""
        if type(found) is type(expected) and found == expected:
            return True
        self.add(code, "fail", f"{what} says {shown(found)}, expected {shown(expected)}")
        return False

    def failed(self, code: str) -> bool:
        """Whether any check of this code failed so far."""
        return any(check.code == code and check.status == "fail" for check in self.found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trust:
    """The key that a signature was checked with, and how it got here; only `pinned` and `file` give trust."""

    key_id: str | None = None
    source: Source = "none"


def state_of(kind: Kind, checks: tuple[Check, ...]) -> State:
    """The one rule from checks to state; a check that was skipped proves nothing either way."""
    failed = {check.code for check in checks if check.status == "fail"}
    passed = {check.code for check in checks if check.status == "pass"}
    if failed & _MALFORMED:
        return "malformed"
    if failed:
        return "invalid"
    if not passed & _PROOF[kind]:
        return "indeterminate"
    if "key_trust" in passed and passed & _SIGNED:
        return "trusted"
    return "valid"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """Everything that was found out about one target."""

    target: str
    kind: Kind
    pith_number: str | None = None
    checks: tuple[Check, ...] = ()
    trust: Trust = field(default_factory=Trust)

    @property
    def state(self) -> State:
        """The state that follows from the checks."""
        return state_of(self.kind, self.checks)

    @property
    def exit_code(self) -> int:
        """The process exit code that belongs to the state."""
        return EXIT_CODES[self.state]

    def with_checks(self, *checks: Check) -> "Verification":
        """The same verification with more checks at its end."""
        return replace(self, checks=(*self.checks, *checks))

    def to_json(self) -> dict[str, Any]:
        """The object that `repro verify --json` prints."""
        return {
            "schema": SCHEMA,
            "target": self.target,
            "kind": self.kind,
            "state": self.state,
            "pith_number": self.pith_number,
            "checks": [{"code": c.code, "status": c.status, "detail": c.detail} for c in self.checks],
            "trust": {"key_id": self.trust.key_id, "source": self.trust.source},
        }


def worst_exit_code(codes: list[int]) -> int:
    """The exit code of a run over several targets: proven bad beats malformed beats network beats indeterminate."""
    return max(codes, key=lambda code: SEVERITY.index(code) if code in SEVERITY else len(SEVERITY), default=0)
