"""Audit statements: somebody executed parts of a replication again, and says how well they agreed.

An audit statement is an in-toto Statement in a DSSE envelope, like the replication's own; its subject is the replication's
manifest, by digest. docs/replication-record.md, section 10, is normative.

- `sign_audit`: what an auditor found, as a statement beside the bundle
- `read_audit`, `verify_audit`: form and signature; whether the draw was the seed's is for a reader of plans to say
- `merge_audits`: what several auditors found of one bundle: order and repetition change nothing, contradictions stay
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from records import canonical
from records.errors import InvalidError, MalformedError, ReproError
from records.fields import is_sha256
from records.keys import KeySet, PrivateKey, PublicKey, fingerprint, parse_public_key, utc_key
from records.report import Check, Verification
from records.statement import Envelope, make_statement, open_envelope, sign_envelope, verify_envelope
from records.versions import check_version

AUDIT_TYPE: Final = "urn:pith-repro:audit:v1"
AUDIT_SCHEMA: Final = "repro.audit/v2"
MERGED_SCHEMA: Final = "repro.audits/v1"
AGREEMENTS: Final = ("bitwise", "within_tolerance", "differs", "missing")
_AGREES: Final = frozenset(AGREEMENTS[:2])
SUBJECT: Final = "manifest.json"
MAX_ITEMS: Final = 10_000

_NUMBER: Final = re.compile(r"[0-9]{1,40}(\.[0-9]{1,400})?|not comparable")
_FIELDS: Final = frozenset(
    {"schema", "statement_sha256", "plan_sha256", "draw", "rule", "tolerance", "differing", "items", "environment",
     "code", "cost", "auditor", "finished_at"}
)  # fmt: skip
_ITEM: Final = frozenset({"arm", "seed", "segment", "steps", "agreement", "difference", "lines", "not_compared"})


def sign_audit(predicate: Mapping[str, Any], *, manifest_sha256: str, key: PrivateKey | None) -> bytes:
    """The audit statement as canonical JSON; `predicate` gets the public half of `key` as `auditor`.

    Raises MalformedError for a predicate of another form.
    """
    said = {**predicate, "auditor": None if key is None else key.public.to_json()}
    statement = make_statement(SUBJECT, manifest_sha256, AUDIT_TYPE, said)
    _check(statement)
    return sign_envelope(statement, key)


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """A parsed audit statement: whose (the key that came along), on which bundle, and the predicate."""

    envelope: Envelope
    auditor: PublicKey | None
    manifest_sha256: str
    predicate: Mapping[str, Any]


def read_audit(data: bytes) -> Audit:
    """The audit statement in `data`; MalformedError where it has another form."""
    envelope = open_envelope(data)
    _check(envelope.statement)
    predicate = envelope.statement["predicate"]
    auditor = predicate["auditor"]
    return Audit(
        envelope=envelope,
        auditor=None if auditor is None else parse_public_key(auditor, source="document"),
        manifest_sha256=envelope.statement["subject"][0]["digest"]["sha256"],
        predicate=predicate,
    )


def _check(statement: Mapping[str, Any]) -> None:
    check_version(statement["predicateType"], AUDIT_TYPE, what="audit: expected the predicate type")
    predicate, subject = statement["predicate"], statement["subject"][0]
    check_version(predicate.get("schema"), AUDIT_SCHEMA, what="audit: expected the form")
    if set(predicate) != _FIELDS:
        raise MalformedError(f"audit: expected exactly the fields {', '.join(sorted(_FIELDS))}")
    digests = (subject["digest"]["sha256"], predicate["statement_sha256"], predicate["plan_sha256"])
    if subject["name"] != SUBJECT or not all(map(is_sha256, digests)):
        raise MalformedError(f"audit: expected the subject {SUBJECT}, and SHA-256 digests of it, statement and plan")
    draw = predicate["draw"]
    if not isinstance(draw, dict) or set(draw) != {"seed", "arms", "segments"} or not all(map(_count, draw.values())):
        raise MalformedError("audit: expected draw with seed, arms and segments, whole numbers of at least 0")
    if predicate["rule"] not in ("bitwise", "tolerance") or not _texts(predicate["differing"]):
        raise MalformedError("audit: expected the rule bitwise or tolerance, and a list of texts under differing")
    if (predicate["rule"] == "bitwise") != (not predicate["differing"]):
        raise MalformedError(
            "audit: the rule is bitwise where nothing differs from the plan's, and tolerance elsewhere"
        )
    for name in ("tolerance", "environment", "code", "cost"):
        if not isinstance(predicate[name], dict):
            raise MalformedError(f"audit: expected an object under {name}")
    if not isinstance(predicate["finished_at"], str):
        raise MalformedError("audit: expected a time under finished_at")
    utc_key(predicate["finished_at"])
    items = predicate["items"]
    if not isinstance(items, list) or not 0 < len(items) <= MAX_ITEMS:
        raise MalformedError(f"audit: expected 1 to {MAX_ITEMS} items")
    for item in items:
        _check_item(item, predicate["rule"])
    if len({_place(item) for item in items}) != len(items):
        raise MalformedError("audit: expected no item twice")


def _check_item(item: Any, rule: str) -> None:
    if not isinstance(item, dict) or set(item) != _ITEM:
        raise MalformedError(f"audit: expected each item with {', '.join(sorted(_ITEM))}")
    if not isinstance(item["arm"], str) or not _count(item["seed"]) or not _count(item["lines"]):
        raise MalformedError("audit: expected each item's arm as a text, its seed and lines as whole numbers")
    segment, steps = item["segment"], item["steps"]
    if segment is not None or steps is not None:
        whole = isinstance(steps, list) and len(steps) == 2 and all(map(_count, steps)) and steps[0] < steps[1]
        if not whole or not _count(segment) or segment < 1:
            raise MalformedError(
                "audit: expected segment and steps of an item both null, or a number and [after, up to]"
            )
    if item["agreement"] not in AGREEMENTS or not _texts(item["not_compared"]):
        raise MalformedError(f"audit: expected an agreement, one of {', '.join(AGREEMENTS)}, and texts not compared")
    if not isinstance(item["difference"], str) or not _NUMBER.fullmatch(item["difference"]):
        raise MalformedError("audit: expected each difference as a decimal string, or `not comparable`")
    if item["agreement"] == "within_tolerance" and rule == "bitwise":
        raise MalformedError("audit: nothing is within a tolerance where the rule is bitwise")


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def verify_audit(data: bytes, *, trusted: KeySet, target: str = "-") -> Verification:
    """The checks `strict_json schema envelope_signature key_trust` of an audit statement.

    Never raises for what is in `data`. An unsigned statement stays `indeterminate`: nobody vouches for it.
    """
    found = Verification(target=target, kind="audit_statement")
    try:
        audit = read_audit(data)
    except ReproError as error:
        code = "strict_json" if str(error).startswith("strict JSON") else "schema"
        return found.with_checks(Check(code=code, status="fail", detail=str(error)))
    own = [] if audit.auditor is None else [audit.auditor]
    checks, trust = verify_envelope(
        audit.envelope, trusted=trusted, document_keys=own, at=audit.predicate["finished_at"]
    )
    said = f"an audit statement, {AUDIT_SCHEMA}, on the manifest {audit.manifest_sha256[:12]}…: {summary(audit)}"
    return Verification(
        target=target,
        kind=found.kind,
        checks=(
            Check(code="strict_json", status="pass", detail="strict JSON"),
            Check(code="schema", status="pass", detail=said),
            *checks,
        ),
        trust=trust,
    )


def summary(audit: Audit) -> str:
    """How many items agreed, and how."""
    counts = {name: sum(item["agreement"] == name for item in audit.predicate["items"]) for name in AGREEMENTS}
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count)


Place = tuple[str, int, int, int, int]
"""An item: arm, seed, segment (0 for the whole arm with its measures), after which step, up to which."""


def _place(item: Mapping[str, Any]) -> Place:
    steps = item["steps"] or [0, 0]
    return item["arm"], item["seed"], item["segment"] or 0, steps[0], steps[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditedItem:
    """What the auditors found of one item, by the fingerprints of their keys; one auditor may contradict himself."""

    place: Place
    agree: tuple[str, ...]
    differ: tuple[str, ...]

    @property
    def contradiction(self) -> bool:
        """Whether some say that it agrees, and some that it does not."""
        return bool(self.agree and self.differ)


@dataclass(frozen=True, kw_only=True, slots=True)
class MergedAudits:
    """What the audits of one bundle say together. `auditors`: key id and whether it is trusted, by fingerprint."""

    manifest_sha256: str
    auditors: Mapping[str, tuple[str, bool]]
    items: tuple[AuditedItem, ...]
    refused: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 where everybody agrees with the bundle, 1 where trusted auditors found an item to differ and none of them
        says otherwise, 4 elsewhere: a contradiction, the word of strangers, or no audit."""
        trusted = {mark for mark, (_, trusted) in self.auditors.items() if trusted}
        if any(trusted.intersection(item.differ) and not trusted.intersection(item.agree) for item in self.items):
            return 1
        return 4 if not self.items or any(item.differ for item in self.items) else 0

    def to_json(self) -> dict[str, Any]:
        """The merge as JSON, the same for every order and repetition of the same statements."""
        return {
            "schema": MERGED_SCHEMA,
            "manifest_sha256": self.manifest_sha256,
            "auditors": [
                {"fingerprint": key, "key_id": key_id, "trusted": trusted}
                for key, (key_id, trusted) in sorted(self.auditors.items())
            ],
            "items": [
                {
                    "arm": item.place[0],
                    "seed": item.place[1],
                    "segment": item.place[2] or None,
                    "steps": list(item.place[3:]) if item.place[2] else None,
                    "agree": list(item.agree),
                    "differ": list(item.differ),
                    "contradiction": item.contradiction,
                }
                for item in self.items
            ],
            "refused": list(self.refused),
        }


def merge_audits(
    statements: Iterable[bytes],
    *,
    manifest_sha256: str,
    trusted: KeySet,
    examine: Callable[[bytes], None] | None = None,
) -> MergedAudits:
    """The audits of the bundle with this manifest, together.

    A statement whose signature does not hold, that nobody signed, that speaks of another bundle or for which `examine`
    raises is refused, with the reason; it counts for nothing.
    """
    said: dict[Place, dict[str, set[bool]]] = {}
    auditors: dict[str, tuple[str, bool]] = {}
    refused: set[str] = set()
    for data in statements:
        name = canonical.sha256_hex(data)[:12]
        try:
            audit, key, trust = _vouched(data, trusted)
            if audit.manifest_sha256 != manifest_sha256:
                raise InvalidError(f"it speaks of another bundle, with the manifest {audit.manifest_sha256[:12]}…")
            if examine is not None:
                examine(data)
        except ReproError as error:
            refused.add(f"audit statement {name}…: {error}")
            continue
        mark = fingerprint(key.raw)
        before = auditors.get(mark, (key.key_id, False))
        auditors[mark] = (min(before[0], key.key_id), before[1] or trust)
        for item in audit.predicate["items"]:
            said.setdefault(_place(item), {}).setdefault(mark, set()).add(item["agreement"] in _AGREES)
    items = tuple(
        AuditedItem(
            place=place,
            agree=tuple(sorted(mark for mark, words in marks.items() if True in words)),
            differ=tuple(sorted(mark for mark, words in marks.items() if False in words)),
        )
        for place, marks in sorted(said.items())
    )
    return MergedAudits(manifest_sha256=manifest_sha256, auditors=auditors, items=items, refused=tuple(sorted(refused)))


def _vouched(data: bytes, trusted: KeySet) -> tuple[Audit, PublicKey, bool]:
    """The statement, the key under which its signature holds, and whether that key is trusted."""
    audit = read_audit(data)
    found = verify_audit(data, trusted=trusted)
    faults = [check.detail for check in found.checks if check.status == "fail"]
    if faults:
        raise InvalidError("; ".join(faults))
    signers = [key_id for key_id, _ in audit.envelope.signatures]
    known = [trusted.find(key_id) or audit.auditor for key_id in signers]
    key = next((key for key in known if key is not None and key.key_id in signers), None)
    if key is None:
        raise InvalidError("nobody signed it, or with a key that is not at hand")
    return audit, key, found.state == "trusted"


def is_audit(envelope: Envelope) -> bool:
    """Whether an opened envelope holds an audit statement, of any version."""
    return str(envelope.statement["predicateType"]).startswith(AUDIT_TYPE.rpartition(":")[0])
