"""Replication records: what binds a run's files, its verdicts and its paper together under one signature.

The bundle's files are bound by manifest.json, the manifest by the predicate's `manifest_sha256`, the predicate by the
signed statement in statement.dsse.json, and the statement's subject is the paper. docs/replication-record.md gives
every byte.

- `build_replication` adds manifest, statement and (where signed) the public key to a run's files.
- `side_by_side` lists the verdicts of several replications of one paper, conflicts kept.
- `verify_replication` makes the checks that need no knowledge of papers or traces; its caller appends `trace` and
  `verdicts`.
"""

import base64
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from records import canonical
from records.document import verify_document
from records.errors import InvalidError, MalformedError, ReproError, UnsupportedError, UsageError
from records.fields import get, is_sha256, shown
from records.keys import KeySet, PrivateKey, parse_public_key, refuse_secrets, utc_key
from records.number import FULL_NUMBER, parse_reference
from records.package import MANIFEST, STATEMENT, build_manifest, check_manifest, check_name
from records.report import Check, Verification
from records.statement import Envelope, make_statement, open_envelope, sign_envelope, verify_envelope
from records.versions import check_version

PREDICATE_TYPE: Final = "urn:pith-repro:replication-record:v1"
PREDICATE_SCHEMA: Final = "repro.replication/v1"
SIDE_BY_SIDE_SCHEMA: Final = "repro.replications/v1"
PLAN: Final = "plan.json"
OUTCOME: Final = "outcome.json"
PAPER: Final = "paper.json"
PITH_RECORD: Final = "pith-record.json"
PUBLIC_KEY: Final = "signing-key.json"
VERDICTS: Final = ("replicated", "not_replicated", "inconclusive", "not_tested")

_ARXIV_NAME: Final = re.compile(r"arxiv:(?:\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?/\d{7})")
_TEXTS: Final = ("plan_sha256", "outcome_sha256", "manifest_sha256", "scale", "finished_at")


def build_replication(
    files: Mapping[str, bytes],
    *,
    subject_name: str,
    subject_sha256: str,
    predicate: Mapping[str, Any],
    key: PrivateKey | None,
) -> dict[str, bytes]:
    """`files` with manifest.json, statement.dsse.json and, where there is a key, its public half as signing-key.json.

    `predicate` gets `manifest_sha256`; its other fields are checked against the form that docs/replication-record.md
    gives. Raises MalformedError for another form, InvalidError where a file holds a secret or a home folder's path.
    """
    for name in (MANIFEST, STATEMENT, PUBLIC_KEY):
        if name in files:
            raise MalformedError(f"bundle: {name} is written by the bundler, found one among the files")
    bundle = {check_name(name): bytes(data) for name, data in files.items()}
    if key is not None:
        bundle[PUBLIC_KEY] = canonical.dumps(key.public.to_json())
        for name, data in bundle.items():
            if any(form in data for form in (key.seed, key.seed.hex().encode(), base64.b64encode(key.seed))):
                raise InvalidError(f"{name!a} holds the signing key; take it out before publishing, and make a new key")
    refuse_secrets(bundle)
    bundle[MANIFEST] = build_manifest(bundle)
    predicate = {**predicate, "manifest_sha256": canonical.sha256_hex(bundle[MANIFEST])}
    statement = make_statement(subject_name, subject_sha256, PREDICATE_TYPE, predicate)
    faults = statement_faults(statement)
    if faults:
        raise MalformedError(f"replication record: {'; '.join(faults)}")
    bundle[STATEMENT] = sign_envelope(statement, key)
    refuse_secrets({STATEMENT: canonical.dumps(statement)})
    return bundle


def statement_faults(statement: dict[str, Any]) -> list[str]:
    """What in a statement differs from the form of a replication record; the form is small enough to check by hand."""
    faults: list[str] = []
    name, sha = statement["subject"][0]["name"], statement["subject"][0]["digest"]["sha256"]
    if not FULL_NUMBER.fullmatch(name) and not _ARXIV_NAME.fullmatch(name):
        faults.append(f"expected a full Pith number or arxiv:ID as the subject's name, found {name[:60]!a}")
    if not is_sha256(sha):
        faults.append("expected 64 lower-case hex digits as the subject's digest")
    if statement["predicateType"] != PREDICATE_TYPE:
        try:
            check_version(statement["predicateType"], PREDICATE_TYPE, what="statement: expected predicateType")
        except MalformedError as error:
            return [str(error)]
    predicate = statement["predicate"]
    try:
        check_version(predicate.get("schema"), PREDICATE_SCHEMA, what="predicate: expected schema")
    except UnsupportedError as error:
        return [str(error)]  # the fields of another version are no faults of this one
    except MalformedError as error:
        faults.append(str(error))
    faults += [f"expected a text under {field}" for field in _TEXTS if not isinstance(predicate.get(field), str)]
    for field in ("plan_sha256", "outcome_sha256", "manifest_sha256"):
        if isinstance(predicate.get(field), str) and not is_sha256(predicate[field]):
            faults.append(f"expected 64 lower-case hex digits under {field}")
    faults += [f"expected an object under {field}" for field in ("paper", "environment", "code")
               if not isinstance(predicate.get(field), dict)]  # fmt: skip
    if isinstance(predicate.get("finished_at"), str):
        try:
            utc_key(predicate["finished_at"])
        except MalformedError as error:
            faults.append(f"finished_at: {error}")
    code = predicate.get("code")
    if isinstance(code, dict) and not isinstance(code.get("dirty"), bool):
        faults.append("expected true or false under code.dirty: a dirty tree is stated, never left out")
    verdicts = predicate.get("verdicts")
    if not isinstance(verdicts, list) or not verdicts:
        faults.append("expected at least one verdict")
    else:
        for entry in verdicts:
            if (
                not isinstance(entry, dict)
                or not isinstance(entry.get("claim"), str)
                or entry.get("verdict") not in VERDICTS
            ):
                faults.append(f"expected each verdict as a claim with one of {', '.join(VERDICTS)}")
                break
        else:
            if len({entry["claim"] for entry in verdicts}) != len(verdicts):
                faults.append("expected one verdict a claim, found two")
    return faults


def read_statement(files: Mapping[str, bytes]) -> Envelope:
    """The opened envelope of a bundle; MalformedError where it is missing or has another form."""
    if STATEMENT not in files:
        raise MalformedError(f"bundle: expected {STATEMENT}, found none; this is not a replication bundle")
    if canonical.encode_parsed(canonical.loads(files[STATEMENT])) != files[STATEMENT]:
        raise MalformedError(f"bundle: expected {STATEMENT} as canonical JSON, so that one record has one spelling")
    return open_envelope(files[STATEMENT])


def verify_replication(files: Mapping[str, bytes], *, trusted: KeySet, target: str = "-") -> Verification:
    """The checks `strict_json schema envelope_signature key_trust manifest plan` and those of the bundled Pith record.

    Never raises for what is in the bundle. The state stays `indeterminate` until the caller appends a passed `verdicts`
    check, for a bundle whose verdicts were not judged again has shown nothing.
    """
    found = Verification(target=target, kind="replication_bundle")
    try:
        envelope = read_statement(files)
    except MalformedError as error:
        code = "strict_json" if str(error).startswith("strict JSON") else "schema"
        return found.with_checks(Check(code=code, status="fail", detail=str(error)))
    found = found.with_checks(Check(code="strict_json", status="pass", detail=f"{STATEMENT} is strict JSON"))
    faults = statement_faults(envelope.statement)
    if faults:
        return found.with_checks(*(Check(code="schema", status="fail", detail=fault) for fault in faults))
    found = found.with_checks(Check(code="schema", status="pass", detail=f"a replication record, {PREDICATE_SCHEMA}"))

    predicate = envelope.statement["predicate"]
    document_keys = []
    if PUBLIC_KEY in files:
        try:
            document_keys = [parse_public_key(canonical.loads(files[PUBLIC_KEY]), source="document")]
        except ReproError as error:
            found = found.with_checks(Check(code="schema", status="fail", detail=f"{PUBLIC_KEY}: {error}"))
    checks, trust = verify_envelope(envelope, trusted=trusted, document_keys=document_keys, at=predicate["finished_at"])
    checks += _manifest(files, predicate["manifest_sha256"])
    checks += [_bound(files, PLAN, "plan", predicate["plan_sha256"], "plan_sha256")]
    checks += [_bound(files, OUTCOME, "plan", predicate["outcome_sha256"], "outcome_sha256")]
    number, subject = _subject(files, envelope.statement["subject"][0], predicate["paper"], trusted)
    return Verification(
        target=target,
        kind=found.kind,
        pith_number=number,
        checks=(*found.checks, *checks, *subject),
        trust=trust,
    )


def _manifest(files: Mapping[str, bytes], expected: str) -> list[Check]:
    checks = check_manifest(files)
    if MANIFEST in files and canonical.sha256_hex(files[MANIFEST]) != expected:
        detail = f"{MANIFEST} is not the one that the statement names: its SHA-256 differs from manifest_sha256"
        checks = [check for check in checks if check.status == "fail"]
        checks.append(Check(code="manifest", status="fail", detail=detail))
    return checks


def _bound(files: Mapping[str, bytes], name: str, code: str, expected: str, field: str) -> Check:
    if name not in files:
        return Check(code=code, status="fail", detail=f"expected {name} in the bundle, found none")
    found = canonical.sha256_hex(files[name])
    if found != expected:
        return Check(
            code=code, status="fail", detail=f"{name} has SHA-256 {found}, the statement's {field} is {expected}"
        )
    return Check(code=code, status="pass", detail=f"{name} has the SHA-256 that the statement names")


def _subject(
    files: Mapping[str, bytes], subject: dict[str, Any], paper: dict[str, Any], trusted: KeySet
) -> tuple[str | None, list[Check]]:
    """The paper: a Pith record whose number and hash are the subject's, or a paper.json whose identifier and hash are.

    Where the predicate's own `paper` names a number or an identifier, it has to be the subject's too.
    """
    name, sha = subject["name"], subject["digest"]["sha256"]
    if name.startswith("pith:"):
        checks = _pith_subject(files, name, sha, trusted)
        if paper.get("pith_number", name) != name:
            detail = f"the predicate's paper is {shown(paper['pith_number'])}, the subject is {name}"
            checks.append(Check(code="pith_number", status="fail", detail=detail))
        return name, checks
    if PITH_RECORD in files:
        detail = f"the bundle holds a Pith record, and its subject is {name}; expected the Pith number"
        return None, [Check(code="pith_number", status="fail", detail=detail)]
    checks = [_bound(files, PAPER, "canonical_hash", sha, "subject digest")]
    checks.append(Check(code="pith_number", status="skip", detail=f"the Pith number of {name} is not known"))
    try:
        bundled = canonical.loads(files.get(PAPER, b"null"))
    except MalformedError as error:
        return None, [*checks, Check(code="strict_json", status="fail", detail=f"{PAPER}: {error}")]
    for place, stated in ((PAPER, get(bundled, "arxiv")), ("the predicate's paper", paper.get("arxiv", name))):
        if not isinstance(stated, str) or _identifier(stated) != _identifier(name):
            detail = f"{place} is of arxiv {shown(stated)}, the subject is {name}"
            checks.append(Check(code="aliases", status="fail", detail=detail))
    return None, checks


def _identifier(name: str) -> str | None:
    """An arXiv identifier without prefix and version, or None."""
    try:
        return parse_reference(f"arxiv:{name.removeprefix('arxiv:')}").value
    except UsageError:
        return None


def _pith_subject(files: Mapping[str, bytes], name: str, sha: str, trusted: KeySet) -> list[Check]:
    if PITH_RECORD not in files:
        detail = f"expected {PITH_RECORD} for the subject {name}, found none"
        return [Check(code="pith_number", status="fail", detail=detail)]
    verified = verify_document(files[PITH_RECORD], target=PITH_RECORD, trusted=trusted)
    # The record's own receipt is reported, but its key gives the replication no trust: that comes from the envelope.
    checks = [check for check in verified.checks if check.code != "key_trust"]
    if verified.state == "malformed":
        return checks
    if verified.pith_number != name:
        detail = f"the subject is {name}, the bundled record is {verified.pith_number}"
        checks.append(Check(code="pith_number", status="fail", detail=detail))
    record = get(canonical.loads(files[PITH_RECORD]), "canonical_record")
    found = canonical.digest(record) if record is not None else "nothing"
    if found != sha:
        detail = f"{PITH_RECORD} hashes to {found}, the subject's digest is {sha}"
        checks.append(Check(code="canonical_hash", status="fail", detail=detail))
    return checks


@dataclass(frozen=True, kw_only=True, slots=True)
class ClaimVerdict:
    """One replication's verdict on one claim: who signed it, at which scale, in which bundle."""

    verdict: str
    scale: str
    signer: str
    manifest_sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedClaim:
    """One claim over all replications; no verdict is dropped for another."""

    claim: str
    verdicts: tuple[ClaimVerdict, ...]

    @property
    def conflict(self) -> bool:
        """Whether some replicate the claim and others do not, at one scale."""
        scales = {entry.scale for entry in self.verdicts}
        return any({"replicated", "not_replicated"} <= self._at(scale) for scale in scales)

    def _at(self, scale: str) -> set[str]:
        return {entry.verdict for entry in self.verdicts if entry.scale == scale}

    def summary(self) -> str:
        """`k of n replicated`, n being those that decided, and whether they conflict."""
        decided = [entry for entry in self.verdicts if entry.verdict in ("replicated", "not_replicated")]
        agreed = sum(entry.verdict == "replicated" for entry in decided)
        return f"{agreed} of {len(decided)} replicated" + (", in conflict" if self.conflict else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class SideBySide:
    """The replications of one paper, claim by claim."""

    subject: str
    count: int
    claims: tuple[ComparedClaim, ...]

    def to_json(self) -> dict[str, Any]:
        """The object that a mirror publishes as replications.json."""
        return {
            "schema": SIDE_BY_SIDE_SCHEMA,
            "subject": self.subject,
            "replications": self.count,
            "claims": [
                {
                    "claim": claim.claim,
                    "summary": claim.summary(),
                    "conflict": claim.conflict,
                    "verdicts": [
                        {
                            "verdict": v.verdict,
                            "scale": v.scale,
                            "signer": v.signer,
                            "manifest_sha256": v.manifest_sha256,
                        }
                        for v in claim.verdicts
                    ],
                }
                for claim in self.claims
            ],
        }


def side_by_side(bundles: Iterable[Mapping[str, bytes]], *, trusted: KeySet) -> SideBySide:
    """Merge the replications of one paper: any order and any duplication of bundles gives the same result.

    A bundle counts once, by its manifest. Its signer is the key under which its envelope verifies, `unsigned` or
    `unverified` (no key at hand). Raises InvalidError where a bundle's own checks fail or its paper is another one.
    """
    found: dict[str, tuple[dict[str, Any], str]] = {}
    subject: str | None = None
    for files in bundles:
        verification = verify_replication(files, trusted=trusted)
        faults = [check.detail for check in verification.checks if check.status == "fail"]
        if faults:
            raise InvalidError(f"a replication does not hold: {'; '.join(faults)}")
        statement = read_statement(files).statement
        name = statement["subject"][0]["name"]
        if subject is not None and name != subject:
            raise InvalidError(f"expected replications of one paper, found {subject} and {name}")
        subject = name
        status = {check.status for check in verification.checks if check.code == "envelope_signature"}
        signer = verification.trust.key_id if "pass" in status else None
        unsigned = "unsigned" if verification.trust.key_id is None else "unverified"
        found[statement["predicate"]["manifest_sha256"]] = (statement["predicate"], signer or unsigned)
    if subject is None:
        raise MalformedError("expected at least one replication, found none")
    claims: dict[str, list[ClaimVerdict]] = {}
    for manifest, (predicate, signer) in sorted(found.items()):
        for entry in predicate["verdicts"]:
            verdict = ClaimVerdict(
                verdict=entry["verdict"], scale=predicate["scale"], signer=signer, manifest_sha256=manifest
            )
            claims.setdefault(entry["claim"], []).append(verdict)
    compared = tuple(ComparedClaim(claim=claim, verdicts=tuple(entries)) for claim, entries in sorted(claims.items()))
    return SideBySide(subject=subject, count=len(found), claims=compared)
