"""A deterministic merge of bundles of one number into a state.

The rules of the registry's `pith-open-graph-merge-v1` are not public, so these are this project's own, under a name
of their own; `compare_with_served` says where a served state differs.

- An event is its canonical bytes: the same bytes twice are one event, wherever and however often they stand.
- An event is invalid when it contradicts what is known: another subject, a `record_created` of another record or with a
  receipt that does not hold. Invalid events are counted and reported; nothing of theirs reaches `current`.
- Events that claim one slot (the same `event_id`, or the same type, target, signer and time) with different content
  are an equivocation: all are kept, and the slot is counted once.
- Everything is sorted by time and then by hash, so order, duplication and split over bundles leave no trace.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from records import canonical
from records.errors import InvalidError, MalformedError
from records.fields import get, shown, text
from records.keys import KeySet, b64_strict, pinned, utc_key
from records.number import FULL_NUMBER, SUFFIX_LENGTH, derived_aliases, suffix_of
from records.receipt import verify_digest

MERGE_VERSION: Final = "repro-merge-v1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """The merged state as the JSON object of state.json, its counts, and why each invalid event is one."""

    state: dict[str, Any]
    event_count: int
    valid_event_count: int
    invalid_event_count: int
    equivocation_count: int
    reasons: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """The canonical bytes of the state: equal for every order, duplication and split of the same events."""
        return canonical.encode_parsed(self.state)


def merge_bundles(bundles: Iterable[Any], *, trusted: KeySet | None = None) -> Merged:
    """Merge parsed bundles of one number.

    Raises MalformedError for something that is not a bundle with a record and a number, InvalidError for bundles of
    different numbers or one whose record is not its number's.
    """
    trusted = pinned() if trusted is None else trusted
    number: str | None = None
    record: Any = None
    events: dict[str, Any] = {}
    aliases: dict[bytes, Any] = {}
    for bundle in bundles:
        stated = text(bundle, "pith_number")
        if stated is None or not FULL_NUMBER.fullmatch(stated) or not isinstance(get(bundle, "canonical_record"), dict):
            raise MalformedError("merge: expected bundles with a full pith_number and a canonical_record")
        derived = suffix_of(bytes.fromhex(canonical.digest(bundle["canonical_record"])))
        if stated[-SUFFIX_LENGTH:] != derived:
            raise InvalidError(f"merge: the bundle of {stated} holds the record of {derived}")
        if number is not None and stated != number:
            raise InvalidError(f"merge: expected bundles of one number, found {number} and {stated}")
        number, record = stated, bundle["canonical_record"]
        for event in _list(bundle, "events"):
            events[canonical.digest(event)] = event
        for alias in _list(bundle, "source_aliases"):
            aliases[canonical.dumps(alias)] = alias
    if number is None:
        raise MalformedError("merge: expected at least one bundle, found none")

    digest = canonical.digest(record)
    reasons: list[str] = []
    valid: list[tuple[str, str, Any]] = []
    for event_hash, event in events.items():
        fault = _fault(event, number, digest, trusted)
        if fault is None:
            valid.append((utc_key(event["created_at"]) if "created_at" in event else "", event_hash, event))
        else:
            reasons.append(f"event {event_hash[:12]}: {fault}")
    valid.sort(key=lambda item: item[:2])
    conflicts = _equivocations(valid)
    expected = derived_aliases(record, digest)
    kept = [alias for alias in aliases.values() if _alias_follows(alias, expected)]
    state = {
        "state_type": "pith_open_graph_state",
        "state_version": "1.0",
        "pith_number": number,
        "merge_version": MERGE_VERSION,
        "event_count": len(events),
        "valid_event_count": len(valid),
        "invalid_event_count": len(reasons),
        "equivocation_count": conflicts,
        "current": {
            "canonical_record": record,
            "source_aliases": sorted(kept, key=canonical.dumps),
            "graph_snapshots": [
                {**event, "event_id": event.get("event_id", f"sha256:{event_hash}")}
                for _, event_hash, event in valid
                if isinstance(get(event, "payload", "graph_snapshot"), dict)
            ],
        },
    }
    return Merged(
        state=state,
        event_count=len(events),
        valid_event_count=len(valid),
        invalid_event_count=len(reasons),
        equivocation_count=conflicts,
        reasons=tuple(sorted(reasons)),
    )


def _list(bundle: Any, name: str) -> list[Any]:
    value = bundle.get(name, [])
    if not isinstance(value, list):
        raise MalformedError(f"merge: expected a list under {name}")
    return value


def _fault(event: Any, number: str, digest: str, trusted: KeySet) -> str | None:
    """Why an event is invalid, or None. That it is valid says nothing of its signature, for which no rule is public."""
    kind, payload = text(event, "event_type"), get(event, "payload")
    if kind is None or not isinstance(payload, dict):
        return "expected an object with event_type and payload"
    subject = event.get("subject_pith_number", number)
    if subject != number:
        return f"its subject is {shown(subject)}, expected {number}"
    if "created_at" in event:
        try:
            utc_key(event["created_at"] if isinstance(event["created_at"], str) else "")
        except MalformedError:
            return f"created_at is {shown(event['created_at'])}, expected a UTC time"
    if kind != "record_created":
        return None
    record, stated = payload.get("canonical_record"), payload.get("canonical_sha256", digest)
    if stated != digest or (record is not None and canonical.digest(record) != digest):
        return "it creates another record than the bundle's"
    return _receipt_fault(payload.get("receipt"), digest, trusted)


def _receipt_fault(receipt: Any, digest: str, trusted: KeySet) -> str | None:
    signature, key = text(receipt, "signature_b64"), trusted.find(text(receipt, "key_id"))
    if receipt is None or signature is None:
        return None
    if receipt.get("canonical_sha256", digest) != digest:
        return "its receipt is of another record"
    if key is None:
        return None
    try:
        verify_digest(key.raw, bytes.fromhex(digest), b64_strict(signature, size=64, what="signature_b64"))
    except (InvalidError, MalformedError) as error:
        return f"its receipt does not hold: {error}"
    return None


def _alias_follows(alias: Any, expected: dict[str, str]) -> bool:
    """Whether an alias may stand in a state: of a kind that the record decides, with the value that it decides."""
    kind, value = text(alias, "alias_kind"), text(alias, "alias_value")
    return kind is not None and value is not None and expected.get(kind, value).lower() == value.lower()


def _equivocations(events: list[tuple[str, str, Any]]) -> int:
    """How many slots hold events of different content; two slots of the same set of events are one."""
    slots: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for time, event_hash, event in events:
        if isinstance(event.get("event_id"), str):
            slots["id", event["event_id"]].add(event_hash)
        if time:
            target, signer = shown(event.get("target")), shown(get(event, "signer", "key_id"))
            slots["slot", event["event_type"], target, signer, time].add(event_hash)
    return len({frozenset(hashes) for hashes in slots.values() if len(hashes) > 1})


def compare_with_served(merged: Merged, served: Any) -> list[str]:
    """Where a served state differs from ours: its counts, record, aliases and snapshots; empty where nothing does."""
    faults: list[str] = []
    for name in ("pith_number", "event_count", "valid_event_count", "invalid_event_count", "equivocation_count"):
        if get(served, name) != merged.state[name]:
            faults.append(f"{name}: the served state says {shown(get(served, name))}, the merge {merged.state[name]!r}")
    ours, theirs = merged.state["current"], get(served, "current")
    if get(theirs, "canonical_record") != ours["canonical_record"]:
        faults.append("canonical_record: the served state shows another record")
    pairs = (("source_aliases", ("alias_kind", "alias_value")), ("graph_snapshots", ("payload",)))
    for name, fields in pairs:
        listed = get(theirs, name)
        found = {_picked(item, fields) for item in listed} if isinstance(listed, list) else set()
        wanted = {_picked(item, fields) for item in ours[name]}
        if found != wanted:
            faults.append(
                f"{name}: {len(wanted - found)} are missing in the served state, {len(found - wanted)} are extra"
            )
    return faults


def _picked(item: Any, fields: tuple[str, ...]) -> bytes:
    return canonical.dumps({name: get(item, name) for name in fields})
