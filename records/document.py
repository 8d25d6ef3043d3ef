"""What Pith publishes, told apart by content and checked in every way that a rule is known for.

- `form_of` names the form of a parsed document: record, bundle, state, graph, mirrors or key.
- `verify_document` makes every check that its form allows; a check whose field the document lacks is `skip`, with the
  reason, and so is everything no public rule is known for (docs/pith-protocol.md): event signatures, snapshots that
  are not empty.
- The registry's receipts do not cover times, builder, aliases or the year. What follows from the hashed record is
  compared with it; the rest is named as unauthenticated.
"""

import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal

from records import canonical
from records.errors import MalformedError, ReproError
from records.fields import get, is_sha256, shown, text
from records.keys import KeySet, b64_strict, fingerprint, parse_public_key
from records.merge import merge_bundles
from records.number import FULL_NUMBER, SUFFIX_LENGTH, Reference, arxiv_key, derived_aliases, suffix_of
from records.receipt import verify_digest
from records.report import Check, Checks, Kind, Trust, Verification

Form = Literal["record", "bundle", "state", "graph", "mirrors", "key"]

EMPTY_LIST_SHA256: Final = canonical.digest({"payload": []})
EMPTY_INTEGRITY_SHA256: Final = canonical.digest({"payload": {"detectors": [], "findings": []}})
#: From this size in bytes on, jsonschema (about 0.1 ms an item) is asked only where the compiled schema says no.
LARGE: Final = 64 * 1024
SIGNED_MESSAGE: Final = "canonical_sha256_bytes"

_KINDS: Final[dict[Form, Kind]] = {
    "record": "pith_record",
    "bundle": "pith_bundle",
    "state": "pith_state",
    "graph": "pith_state",
    "mirrors": "pith_record",
    "key": "pith_record",
}
_UNKNOWN_EVENT_RULE: Final = "no public rule says what an event's id and signature cover"


def form_of(value: Any) -> Form | None:
    """The form of a parsed document, by its content alone; None where it is none of Pith's."""
    if not isinstance(value, dict):
        return None
    if value.get("bundle_type") == "pith_open_graph_bundle":
        return "bundle"
    if value.get("state_type") == "pith_open_graph_state":
        return "state"
    if value.get("manifest_type") == "pith_mirror_manifest":
        return "mirrors"
    if "canonical_record" in value:
        return "record"
    if "public_key_b64" in value and "key_id" in value:
        return "key"
    if "claims" in value and "source" in value and ("references" in value or "integrity" in value):
        return "graph"
    return None


def canonical_text_sha256(text: str) -> str:
    """The registry's title and abstract hashes: SHA-256 of the text in lower case, white space collapsed, trimmed."""
    return canonical.sha256_hex(" ".join(text.lower().split()).encode("utf-8"))


def _other_text_rules(text: str) -> Iterator[tuple[str, str]]:
    """The readings of the rule that no public example tells apart; they differ only outside ASCII."""
    for form in ("NFC", "NFD", "NFKC"):
        normal = unicodedata.normalize(form, text)
        yield f"{form}, lower case", " ".join(normal.lower().split())
        yield f"{form}, case folded", " ".join(normal.casefold().split())
    yield "case folded", " ".join(text.casefold().split())


def verify_document(
    data: bytes,
    *,
    target: str,
    trusted: KeySet,
    asked: Reference | None = None,
    schema_known: str | None = None,
    max_bytes: int = canonical.MAX_BYTES,
) -> Verification:
    """Every check on one Pith document; never raises for what is in `data`.

    `asked` is what the document was fetched for: another paper's document fails, however sound. `schema_known` says
    why the schema need not be applied again (the package's own records are validated when it is built, and pinned by
    hash).
    """
    empty = Verification(target=target, kind="pith_record")
    try:
        value = canonical.loads(data, max_bytes=max_bytes)
    except MalformedError as error:
        return empty.with_checks(Check(code="strict_json", status="fail", detail=str(error)))
    fits = compiled_schema if len(data) > LARGE else None
    return verify_value(value, target=target, trusted=trusted, asked=asked, schema_known=schema_known, fits=fits)


def compiled_schema(form: str, value: Any) -> bool:
    """Whether a value fits the schema of its form, by the predicate compiled from it: quick, and without reasons."""
    from records.schema import predicate

    return predicate(form)(value)


def verify_value(
    value: Any,
    *,
    target: str,
    trusted: KeySet,
    asked: Reference | None = None,
    schema_known: str | None = None,
    fits: Callable[[str, Any], bool] | None = None,
) -> Verification:
    """`verify_document` for a value that `canonical.loads` returned.

    `fits` may say quickly that a value fits its schema; where it does not, jsonschema says why.
    """
    checks = Checks()
    checks.add("strict_json", "pass", "strict JSON: UTF-8, no duplicate keys, no floats, integers within 2**53 - 1")
    form = form_of(value)
    if form is None:
        detail = "expected a Pith record, bundle, state, graph, mirror manifest or key, found none of their fields"
        checks.add("schema", "fail", detail)
        return Verification(target=target, kind="pith_record", checks=checks.all())
    if schema_known is not None:
        checks.add("schema", "pass", schema_known)
    else:
        _schema(checks, form, value, fits)
    number: str | None = None
    trust = Trust()
    if form in ("record", "bundle", "state"):
        number, trust = _record(checks, form, value, trusted)
        if form == "bundle":
            _events(checks, value, trusted)
        elif form == "state":
            _counts(checks, value)
    elif form == "graph":
        _snapshot(checks, value)
    else:
        trust = _keys(checks, form, value, trusted)
    if asked is not None:
        _asked(checks, asked, number, value)
    return Verification(target=target, kind=_KINDS[form], pith_number=number, checks=checks.all(), trust=trust)


def _schema(checks: Checks, form: Form, value: Any, fits: Callable[[str, Any], bool] | None) -> None:
    from records.schema import faults

    found = [] if fits is not None and fits(form, value) else faults(form, value)
    for fault in found:
        checks.add("schema", "fail", fault)
    if not found:
        checks.add("schema", "pass", f"a Pith {form} as records/schemas/pith.json describes it")


def _record(checks: Checks, form: Form, value: Any, trusted: KeySet) -> tuple[str | None, Trust]:
    """The checks on a canonical record and everything that follows from it; the number, and the receipt's key."""
    record = get(value, "current", "canonical_record") if form == "state" else get(value, "canonical_record")
    graphs = _graphs(form, value)
    stated = text(value, "canonical_sha256")
    digest = stated if is_sha256(stated) else None
    if isinstance(record, dict):
        computed = canonical.sha256_hex(canonical.encode_parsed(record))
        if stated is None:
            checks.add(
                "canonical_hash", "skip", f"the document states no canonical_sha256; its record hashes to {computed}"
            )
        elif checks.same("canonical_hash", "canonical_sha256", stated, computed):
            checks.add("canonical_hash", "pass", f"SHA-256 of the canonical record is {computed}")
        digest = computed
        _copies(checks, form, value, graphs, record)
    else:
        checks.add("canonical_hash", "skip", "the document shows no canonical record to hash")
    number = _number(checks, value, record, digest)
    aliases = (
        get(value, "current", "source_aliases")
        if form == "state"
        else value.get("source_aliases", value.get("aliases"))
    )
    _aliases(checks, aliases, record, digest)
    _texts(checks, value, graphs, record)
    trust = _receipt(checks, _receipt_of(form, value), digest, trusted)
    for graph in graphs:
        _snapshot(checks, graph)
    if not graphs:
        checks.add("snapshot_hash", "skip", "the document holds no graph snapshot")
    return number, trust


def _graphs(form: Form, value: Any) -> list[Any]:
    """The graph snapshots of a document: its own, those of a bundle's events, or those that a state lists."""
    if form == "record":
        return [value["graph_snapshot"]] if "graph_snapshot" in value else []
    listed = value.get("events") if form == "bundle" else get(value, "current", "graph_snapshots")
    found = [get(item, "payload", "graph_snapshot") for item in listed] if isinstance(listed, list) else []
    return [graph for graph in found if graph is not None]


def _receipt_of(form: Form, value: Any) -> Any:
    """The receipt of a record, or of the event that created a bundle's; a listing keeps a bare signature."""
    if form == "record":
        if value.get("receipt") is None and value.get("signature_b64") is not None:
            return {name: value[name] for name in ("signature_b64", "key_id") if name in value}
        return value.get("receipt")
    for event in value["events"] if form == "bundle" and isinstance(value.get("events"), list) else []:
        if get(event, "event_type") == "record_created":
            return get(event, "payload", "receipt")
    return None


def _copies(checks: Checks, form: Form, value: Any, graphs: list[Any], record: Mapping[str, Any]) -> None:
    """Copies of the record's fields outside it carry no hash of their own: where they stand, they have to agree."""
    code = "canonical_hash"
    for place, holder in (("source", value), *(("graph_snapshot.source", graph) for graph in graphs)):
        if isinstance(holder, dict) and "source" in holder:
            checks.same(code, place, holder["source"], record.get("source"))
    if form == "record" and isinstance(value.get("schema_version"), str):
        checks.same(code, "schema_version", value["schema_version"], record.get("schema_version"))
    names = (("license", "license"), ("primary_cat", "primary_cat"), ("cross_cats", "cross_cats_sorted"))
    papers = [("paper", get(value, "paper")), *(("graph_snapshot.paper", get(graph, "paper")) for graph in graphs)]
    for place, paper in papers:
        for name, name_in_record in (*names, ("submitted_at", "submitted_at")):
            if isinstance(paper, dict) and name in paper:
                checks.same(code, f"{place}.{name}", paper[name], get(record, "metadata", name_in_record))


def _number(checks: Checks, value: Any, record: Any, digest: str | None) -> str | None:
    suffix = suffix_of(bytes.fromhex(digest)) if digest is not None else None
    year = (text(record, "metadata", "submitted_at") or "")[:4]
    number = f"pith:{year}:{suffix}" if suffix is not None and len(year) == 4 else None
    stated = text(value, "pith_number")
    if stated is None:
        checks.add("pith_number", "skip", f"the document states no number; its record's is {number}")
    elif FULL_NUMBER.fullmatch(stated) is None:
        checks.add("pith_number", "fail", f"expected pith:YYYY: and 26 characters, found {shown(stated)}")
    elif suffix is None:
        checks.add("pith_number", "skip", "there is no hash to derive the number from")
    else:
        if checks.same("pith_number", "pith_number", stated[-SUFFIX_LENGTH:], suffix):
            if isinstance(record, dict):
                checks.add("pith_number", "pass", f"{suffix} are the first 130 bits of the hash")
            else:
                checks.add("pith_number", "skip", "it follows from the stated hash, whose record is not shown")
        if not year:
            checks.add("year", "skip", "the document shows no submission time")
        elif checks.same("year", "the year in pith_number", stated[5:9], year):
            checks.add("year", "pass", f"{year}, from submitted_at in the hashed record")
    if stated is None or FULL_NUMBER.fullmatch(stated) is None or suffix is None:
        checks.add("year", "skip", "no stated number to compare the submission year with")
    if isinstance(value, dict) and "suffix" in value and suffix is not None:
        checks.same("pith_number", "suffix", value["suffix"], suffix)
    short = get(value, "short_pith_number")
    if short is None:
        checks.add("short_number", "skip", "the document states no short number")
    elif suffix is None:
        checks.add("short_number", "skip", "there is no hash to derive the short number from")
    elif checks.same("short_number", "short_pith_number", short, f"pith:{suffix[:8]}"):
        checks.add("short_number", "pass", f"pith:{suffix[:8]}, a lookup and no identity: 40 bits collide")
    return number


def _aliases(checks: Checks, aliases: Any, record: Any, digest: str | None) -> None:
    if not isinstance(aliases, list):
        checks.add("aliases", "skip", "the document lists no aliases")
        return
    expected = derived_aliases(record, digest)
    compared = 0
    for alias in aliases:
        kind, value = text(alias, "alias_kind"), text(alias, "alias_value")
        if kind is None or value is None:
            continue  # the schema check reports it
        if kind not in expected:
            checks.add("aliases", "skip", f"nothing in the record says what {shown(kind)} {shown(value)} should be")
        elif kind == "doi" and not value.lower().startswith("10.48550/"):
            checks.add("aliases", "skip", f"the publisher's DOI {shown(value)} does not follow from the record")
        elif (value.lower() if kind == "doi" else value) == (
            expected[kind].lower() if kind == "doi" else expected[kind]
        ):
            compared += 1
        else:
            checks.add("aliases", "fail", f"the alias {kind} says {shown(value)}, expected {shown(expected[kind])}")
    if compared and not checks.failed("aliases"):
        checks.add("aliases", "pass", f"{compared} follow from the record; when they were created is unauthenticated")
    elif not aliases:
        checks.add("aliases", "skip", "the document lists no aliases")


def _texts(checks: Checks, value: Any, graphs: list[Any], record: Any) -> None:
    """Title and abstract, wherever the document shows them, against the hashes in the record."""
    for code, hashed in (("title_hash", "title_canon_sha256"), ("abstract_hash", "abstract_canon_sha256")):
        name = code.removesuffix("_hash")
        expected = text(record, "metadata", hashed)
        places = [(name, text(value, name)), (f"paper.{name}", text(value, "paper", name))]
        places += [(f"graph_snapshot.paper.{name}", text(graph, "paper", name)) for graph in graphs]
        stated = [(place, found) for place, found in places if found is not None]
        if not stated or expected is None:
            reason = f"the document shows no {name}" if not stated else f"the record shows no {hashed}"
            if not stated and text(value, "paper", f"{name}_excerpt") is not None:
                reason += ", only an excerpt, which its hash does not cover"
            checks.add(code, "skip", reason)
            continue
        for place, found in stated:
            _text(checks, code, place, found, expected)


def _text(checks: Checks, code: str, place: str, found: str, expected: str) -> None:
    if canonical_text_sha256(found) == expected:
        checks.add(code, "pass", f"{place} hashes to {expected}")
        return
    for rule, candidate in _other_text_rules(found):
        if canonical.sha256_hex(candidate.encode("utf-8")) == expected:
            checks.add(code, "pass", f"{place} hashes to {expected} when read as {rule}")
            return
    checks.add(code, "fail", f"{place} hashes to {canonical_text_sha256(found)}, the record says {shown(expected)}")


def _receipt(checks: Checks, receipt: Any, digest: str | None, trusted: KeySet) -> Trust:
    """`receipt_signature`, `receipt_digest` and `key_trust`."""
    codes = ("receipt_signature", "receipt_digest", "key_trust")
    if not isinstance(receipt, dict) or text(receipt, "signature_b64") is None:
        for code in codes:
            checks.add(code, "skip", "the document carries no receipt with a signature")
        return Trust()
    stated = text(receipt, "canonical_sha256")
    if digest is None:
        checks.add("receipt_digest", "skip", "there is no hash to compare the receipt with")
    elif stated is None:
        checks.add(
            "receipt_digest", "skip", "the receipt names no hash; its signature is checked against the record's own"
        )
    elif checks.same("receipt_digest", "receipt.canonical_sha256", stated, digest):
        checks.add("receipt_digest", "pass", "the receipt names this record's hash")
    key_id = text(receipt, "key_id")
    trust = Trust(key_id=key_id if key_id is not None and key_id.isascii() and key_id.isprintable() else None)
    unknown = [name for name, known in (("algorithm", "ed25519"), ("signed_message", SIGNED_MESSAGE),
               ("kind", "pith_receipt")) if receipt.get(name, known) != known]  # fmt: skip
    if unknown:
        detail = f"no rule is known for {unknown[0]} {shown(receipt[unknown[0]])}"
        checks.add("receipt_signature", "fail", detail)
        checks.add("key_trust", "skip", "the signature was not checked")
        return trust
    key = trusted.find(key_id)
    if key is None or digest is None:
        reason = (
            f"the key {shown(key_id)} is neither pinned nor trusted" if key is None else "there is no hash to verify"
        )
        checks.add("receipt_signature", "skip", reason)
        checks.add("key_trust", "skip", reason)
        return trust
    print_stated = text(receipt, "public_key_fingerprint")
    if print_stated is not None and print_stated != fingerprint(key.raw):
        detail = f"the receipt is for a key {shown(print_stated)}, the trusted {key.key_id} is {fingerprint(key.raw)}"
        checks.add("key_trust", "fail", detail)
    try:
        signature = b64_strict(receipt["signature_b64"], size=64, what="signature_b64")
        verify_digest(key.raw, bytes.fromhex(digest), signature)
    except ReproError as error:
        checks.add("receipt_signature", "fail", str(error))
        checks.add("key_trust", "skip", "the signature does not hold")
        return trust
    checks.add("receipt_signature", "pass",
               "Ed25519 over the 32 bytes of the hash; the receipt's times and builder are not covered")  # fmt: skip
    try:
        fault = key.fault_at(text(receipt, "signed_at"))
    except MalformedError as error:
        fault = str(error)
    if fault is not None:
        checks.add("key_trust", "fail", fault)
    elif not checks.failed("key_trust"):
        origin = "pinned in the package" if key.source == "pinned" else "one that you trust (--trusted-keys)"
        checks.add("key_trust", "pass", f"key {key.key_id} is {origin}")
    return Trust(key_id=key.key_id, source=key.source)


def _snapshot(checks: Checks, graph: Any) -> None:
    """The hashes of a graph snapshot's empty parts; for the others no rule is known, and they are skipped."""
    parts: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
        ("claims", "count", ("items",), EMPTY_LIST_SHA256),
        ("references", "count", ("sample",), EMPTY_LIST_SHA256),
        ("formal_canon", "evidence_count", (), EMPTY_LIST_SHA256),
        ("author_claims", "count", (), EMPTY_LIST_SHA256),
        ("integrity", "", ("findings", "detectors_run"), EMPTY_INTEGRITY_SHA256),
    )
    seen = passed = 0
    for name, counter, lists, empty in parts:
        part = get(graph, name)
        if not isinstance(part, dict) or "snapshot_sha256" not in part:
            continue
        seen += 1
        counted = part.get(counter, 0) if counter else 0
        if counted == 0 and all(part.get(item, []) == [] for item in lists):
            if checks.same("snapshot_hash", f"{name}.snapshot_sha256", part["snapshot_sha256"], empty):
                passed += 1
        elif part["snapshot_sha256"] == empty:
            checks.add("snapshot_hash", "fail", f"{name} is not empty, and its snapshot_sha256 is that of an empty one")
        else:
            checks.add("snapshot_hash", "skip", f"no public rule gives the hash of {name} that is not empty")
    if passed:
        checks.add("snapshot_hash", "pass", f"{passed} of {seen} snapshots are empty and hash so")
    elif not seen:
        checks.add("snapshot_hash", "skip", "the snapshot states no hashes")


def _events(checks: Checks, bundle: Any, trusted: KeySet) -> None:
    try:
        merged = merge_bundles([bundle], trusted=trusted)
    except ReproError as error:
        checks.add("merge", "fail", str(error))
        return
    for reason in merged.reasons:
        checks.add("merge", "fail", f"{reason}; a state leaves it out")
    if not merged.reasons:
        conflicts = merged.equivocation_count
        detail = f"{merged.event_count} distinct events merge, {conflicts} equivocations (kept and counted)"
        checks.add("merge", "pass", detail)
    if merged.event_count:
        checks.add("envelope_signature", "skip", f"{_UNKNOWN_EVENT_RULE}: event signatures were not checked")


def _counts(checks: Checks, state: Any) -> None:
    """A state's counts against each other; what it was merged from is not in it."""
    names = ("event_count", "valid_event_count", "invalid_event_count")
    counts = [state.get(name) for name in names]
    if all(type(count) is int for count in counts):
        checks.same("merge", "event_count", counts[0], counts[1] + counts[2])
    if not checks.failed("merge"):
        checks.add("merge", "skip", "a state shows its result, not its events: merge its bundle and compare (--state)")


def _keys(checks: Checks, form: Form, value: Any, trusted: KeySet) -> Trust:
    """A key, or the keys of a mirror manifest: well-formed, and the same as the trusted key of that id."""
    mirrors = value.get("mirrors") if form == "mirrors" else None
    entries = [value] if form == "key" else [get(m, "public_key") for m in mirrors] if isinstance(mirrors, list) else []
    trust = Trust()
    for entry in entries:
        try:
            key = parse_public_key(entry, source="document")
        except MalformedError as error:
            checks.add("key_trust", "fail", str(error))
            continue
        known = trusted.find(key.key_id)
        trust = Trust(key_id=key.key_id, source="document")
        if known is None:
            checks.add("key_trust", "skip", f"key {key.key_id} came with the document: anyone can make one")
        elif known.raw != key.raw:
            checks.add("key_trust", "fail", f"key {key.key_id} is not the trusted key of that id")
        else:
            checks.add("key_trust", "pass", f"key {key.key_id} is the trusted one")
            trust = Trust(key_id=key.key_id, source=known.source)
    return trust


def _asked(checks: Checks, asked: Reference, number: str | None, value: Any) -> None:
    """Whether the document is that of the paper that was asked for."""
    if asked.kind == "pith":
        suffix = number[-SUFFIX_LENGTH:] if number is not None else ""
        if not suffix.startswith(asked.value):
            checks.add("pith_number", "fail", f"asked for {asked}, the document is of {number or 'no known number'}")
        elif asked.year is not None and number is not None and asked.year != number[5:9]:
            checks.add("year", "fail", f"asked for the year {asked.year}, the record was submitted in {number[5:9]}")
    elif asked.kind == "arxiv":
        record = get(value, "current", "canonical_record") or get(value, "canonical_record")
        identifier, version = text(record, "source", "id") or "", get(record, "source", "version")
        if arxiv_key(identifier) != arxiv_key(asked.value):
            checks.add("aliases", "fail", f"asked for {asked}, the record is of arxiv:{shown(identifier)}")
        elif asked.version is not None and asked.version != version:
            checks.add("aliases", "fail", f"asked for {asked}, the record is of version {shown(version)}")
    else:
        listed = get(value, "current", "source_aliases") or get(value, "source_aliases") or get(value, "aliases")
        named = [text(alias, "alias_value") for alias in listed] if isinstance(listed, list) else []
        if asked.value in (name.lower() for name in named if name is not None):
            checks.add("aliases", "skip", f"that {asked} is this paper is the document's word: no hash covers it")
        else:
            checks.add("aliases", "fail", f"asked for {asked}, the document names no such alias")
