"""A plan that is signed before the run, and a run that keeps to it or says why it does not.

- `sign_plan`, `read_signed`, `verify_signed`: the plan in an in-toto Statement, in a DSSE envelope
- `adopt`: the plan to run here: the signed one where code, corpora and environment are its, else refused, or `deviated`
- `check_signed`: whether a bundle's plan is the one that was signed, or deviates from it as it says

docs/replication-record.md, section 11, is normative.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from records import canonical
from records.errors import InvalidError, MalformedError, ReproError, UsageError
from records.keys import KeySet, PrivateKey, PublicKey, parse_public_key, utc_key
from records.report import Check, Verification
from records.statement import Envelope, make_statement, open_envelope, sign_envelope, verify_envelope
from records.versions import check_version
from repro.config import encode
from repro.data import corpus
from repro.environment import code_state, numeric_environment
from repro.workflow.plan import device_of, parse_plan, plan_digest

PLAN_TYPE: Final = "urn:pith-repro:plan:v1"
SIGNED_SCHEMA: Final = "repro.signed-plan/v1"
SIGNED_PLAN: Final = "signed-plan.dsse.json"
_SUBJECT: Final = "plan.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class SignedPlan:
    """A parsed signed plan: the envelope, the plan, the key that came along, and when its signer says he signed."""

    envelope: Envelope
    plan: Mapping[str, Any]
    key: PublicKey | None
    signed_at: str


def sign_plan(plan: Mapping[str, Any], *, key: PrivateKey, signed_at: str) -> bytes:
    """The signed plan as canonical JSON."""
    predicate = {"schema": SIGNED_SCHEMA, "plan": dict(plan), "key": key.public.to_json(), "signed_at": signed_at}
    return sign_envelope(make_statement(_SUBJECT, plan_digest(plan), PLAN_TYPE, predicate), key)


def is_signed_plan(envelope: Envelope) -> bool:
    """Whether an opened envelope holds a signed plan, of any version."""
    return str(envelope.statement["predicateType"]).startswith(PLAN_TYPE.rpartition(":")[0])


def read_signed(data: bytes) -> SignedPlan:
    """The signed plan in `data`.

    Raises:
        MalformedError: another form.
        InvalidError: the subject's digest is not the plan's.
    """
    envelope = open_envelope(data)
    predicate, subject = envelope.statement["predicate"], envelope.statement["subject"][0]
    check_version(envelope.statement["predicateType"], PLAN_TYPE, what="signed plan: expected the predicate type")
    check_version(predicate.get("schema"), SIGNED_SCHEMA, what="signed plan: expected the form")
    if set(predicate) != {"schema", "plan", "key", "signed_at"} or not isinstance(predicate["signed_at"], str):
        raise MalformedError("signed plan: expected schema, plan, key and signed_at, and no more")
    utc_key(predicate["signed_at"])
    plan = parse_plan(canonical.dumps(predicate["plan"]), name="the signed plan")
    if subject["name"] != _SUBJECT or subject["digest"]["sha256"] != plan_digest(plan):
        raise InvalidError("the signed plan's subject is not its plan: expected plan.json with the plan's SHA-256")
    key = None if predicate["key"] is None else parse_public_key(predicate["key"], source="document")
    return SignedPlan(envelope=envelope, plan=plan, key=key, signed_at=predicate["signed_at"])


def verify_signed(data: bytes, *, trusted: KeySet, target: str = "-") -> Verification:
    """The checks `strict_json schema plan envelope_signature key_trust` of a signed plan; never raises for what it holds."""
    found = Verification(target=target, kind="signed_plan")
    try:
        signed = read_signed(data)
    except InvalidError as error:
        return found.with_checks(Check(code="plan", status="fail", detail=str(error)))
    except ReproError as error:
        code = "strict_json" if str(error).startswith("strict JSON") else "schema"
        return found.with_checks(Check(code=code, status="fail", detail=str(error)))
    own = [] if signed.key is None else [signed.key]
    checks, trust = verify_envelope(signed.envelope, trusted=trusted, document_keys=own, at=signed.signed_at)
    paper = signed.plan["paper"]
    said = f"plan {plan_digest(signed.plan)[:16]}… of {paper['slug']} at {signed.plan['scale']}, signed at {signed.signed_at}"
    return Verification(
        target=target,
        kind=found.kind,
        pith_number=paper.get("pith_number"),
        checks=(
            Check(code="strict_json", status="pass", detail="strict JSON"),
            Check(code="schema", status="pass", detail=f"a signed plan, {SIGNED_SCHEMA}"),
            Check(code="plan", status="pass", detail=f"{said} (the signer's word)"),
            *checks,
        ),
        trust=trust,
    )


def adopt(path: Path, *, why: str | None, trusted: KeySet, layout: str = "one process") -> tuple[dict[str, Any], bytes]:
    """The plan to run here of the signed plan at `path`, and its file's bytes.

    Raises:
        UsageError: code, corpora or environment are not the plan's and no reason is given, or one is given for nothing.
        MalformedError, InvalidError: no signed plan, or one whose signature does not hold.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the plan {path}: {error.strerror}") from None
    signed = read_signed(data)
    found = verify_signed(data, trusted=trusted)
    if found.exit_code:
        faults = [check.detail for check in found.checks if check.status == "fail"]
        raise InvalidError(f"{path}: {'; '.join(faults) or 'nobody signed it'}")
    plan = dict(signed.plan)
    code = code_state()
    here = {
        "code": {"sha256": code["sha256"], "version": code["version"]},
        "corpora": {name: corpus.load(name).digest for name in plan["corpora"]},
        "environment": encode(numeric_environment(device_of(plan), layout)),
    }
    differing = _differing(plan, here)
    if not differing:
        if why is not None:
            raise UsageError("--deviate: code, corpora and environment are the plan's; leave it out")
        return plan, data
    if why is None:
        raise UsageError(
            f"{path}: not the plan's here: {'; '.join(differing)}. Run it where they are, or say why not with --deviate"
        )
    if not why.strip() or len(why) > 1000:
        raise UsageError("--deviate: expected a reason of 1 to 1000 characters")
    return deviated(plan, here, why), data


def _differing(plan: Mapping[str, Any], here: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What differs, each with the expected value and the one found."""
    pairs = [("code", plan["code"].get("sha256"), here["code"]["sha256"])]
    pairs += [(f"corpus {name}", digest, here["corpora"].get(name)) for name, digest in plan["corpora"].items()]
    environment = here["environment"]
    # A plan older than a field says nothing of it.
    pairs += [(name, value, environment.get(name)) for name, value in plan["environment"].items()]
    return [f"{name} (expected {_short(a)}, found {_short(b)})" for name, a, b in sorted(pairs) if a != b]


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text[:60]


def deviated(plan: Mapping[str, Any], here: Mapping[str, Any], why: str) -> dict[str, Any]:
    """The signed `plan` as it is run `here`: claims, criteria, arms and seeds unchanged, and the deviation said in it.

    All that follows (chains, statement, verdicts) starts from this plan's digest, which no run without the deviation has.
    """
    differing = _differing(plan, here)
    warning = (
        f"Deviates from the plan {plan_digest(plan)[:16]}… that was signed before: {'; '.join(differing)}. Why: {why}"
    )
    return {
        **plan,
        **{name: here[name] for name in ("code", "corpora", "environment")},
        "warnings": [*plan.get("warnings", []), warning],
        "deviates": {"plan_sha256": plan_digest(plan), "why": why, "differing": differing},
    }


def check_signed(files: Mapping[str, bytes], plan: Mapping[str, Any], *, trusted: KeySet) -> list[Check]:
    """The checks `signed_plan` of a bundle; none, where nothing was signed before and nothing says so."""
    deviates = plan.get("deviates")
    if SIGNED_PLAN not in files:
        if deviates is None:
            return []
        return [
            Check(code="signed_plan", status="fail", detail=f"the plan deviates from another; expected {SIGNED_PLAN}")
        ]
    found = verify_signed(files[SIGNED_PLAN], trusted=trusted)
    faults = [check.detail for check in found.checks if check.status == "fail"]
    if found.exit_code:
        detail = f"{SIGNED_PLAN}: {'; '.join(faults) or 'nobody signed it'}"
        return [Check(code="signed_plan", status="fail", detail=detail)]
    signed = read_signed(files[SIGNED_PLAN])
    expected = signed.plan if deviates is None else deviated(signed.plan, plan, deviates["why"])
    if expected != plan:
        detail = f"the plan is not that of {SIGNED_PLAN}, and deviates from it in more than it says"
        return [Check(code="signed_plan", status="fail", detail=detail)]
    who = f"signed by {found.trust.key_id} ({found.trust.source}) at {signed.signed_at}, the signer's word"
    if deviates is None:
        return [Check(code="signed_plan", status="pass", detail=f"the plan is the one that was {who}")]
    detail = f"deviates from the plan that was {who}, in {'; '.join(deviates['differing'])}. Why: {deviates['why']}"
    return [Check(code="signed_plan", status="pass", detail=detail)]
