"""What is fuzzed: every parser of bytes that somebody else wrote, each with documents to start from.

- `raw` targets get the bytes as they come
- `edit` targets get documents whose parts were replaced, moved or dropped by the fuzzer's choice, and where hashes and
  signatures would end all at the door, these are made anew, as a forger would
"""

import contextlib
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import small
from command_line import ROOT
from opentimestamps.core.notary import BitcoinBlockHeaderAttestation, PendingAttestation
from record_cases import SIGNED, STORE, bundle_of
from timestamp_proofs import DATA, proof

from records import audit, canonical, document, inclusion, merge, package, replication, statement, timestamps
from records.bulk import LineVerifier
from records.errors import ReproError
from records.keys import parse_public_keys, pinned
from records.number import parse_reference
from records.report import Verification
from repro.judge import judge
from repro.trace import check_chain, genesis
from repro.workflow import audit as workflow_audit
from repro.workflow import bundle as workflow_bundle
from repro.workflow import prove, signed
from repro.workflow.bundle import summary
from repro.workflow.evidence import load
from repro.workflow.jobs import jobs
from repro.workflow.plan import parse_plan, plan_digest


class Choices:
    """Decisions read off the fuzzer's bytes; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes, or as many as are left."""
        part = self._data[self._at : self._at + count]
        self._at += count
        return part

    def below(self, limit: int) -> int:
        """A number from 0 to `limit` - 1."""
        return int.from_bytes(self.take(2), "big") % limit if limit > 1 else 0

    @property
    def more(self) -> bool:
        """Whether anything is left to decide with."""
        return self._at < len(self._data)


_VALUES: Sequence[Any] = (
    None, True, False, 0, 1, -1, 3, 64, 2**31, 2**53 - 1, -(2**53) + 1, "", "0", "-0", "1e400", "1" * 400, "0.1", "NaN",
    "00" * 32, "FF" * 32, "../x", "a/b", "\x00", "\u202e", "é", "🦆" * 50, [], {}, [[]], {"": ""}, [0] * 100, "repro.plan/v9",
    "9" * 40 + "." + "9" * 400, "2026-11-21T22:00:00Z", "step", "end", "metric", "diverged", "probe",
)  # fmt: skip


def edited(value: Any, choices: Choices) -> Any:
    """`value` with up to eight of its parts replaced, dropped, doubled or swapped with another part."""
    value = copy.deepcopy({"root": value})
    for _ in range(1 + choices.below(8)):
        places = _places(value)
        holder, key = places[choices.below(len(places))]
        action = choices.below(8)
        if action == 0 and holder is not value:
            del holder[key]
        elif action == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif action == 2:
            other, name = places[choices.below(len(places))]
            if name in other if isinstance(other, dict) else name < len(other):
                holder[key] = copy.deepcopy(other[name])
        elif action == 3 and isinstance(holder, dict):
            holder[choices.take(3).decode("latin-1")] = copy.deepcopy(holder[key])
        elif action == 4 and isinstance(holder[key], str):
            at = choices.below(len(holder[key]) + 1)
            holder[key] = holder[key][:at] + choices.take(2).decode("latin-1") + holder[key][at + choices.below(3) :]
        elif action == 5 and type(holder[key]) is int:
            holder[key] += choices.below(512) - 256
        elif action == 6:
            deep = copy.deepcopy(_VALUES[choices.below(len(_VALUES))])
            for _ in range(choices.below(70)):
                deep = [deep]
            holder[key] = deep
        else:
            holder[key] = copy.deepcopy(_VALUES[choices.below(len(_VALUES))])
        if not choices.more:
            break
    return value["root"]


def _places(value: Any) -> list[tuple[Any, Any]]:
    places, waiting = [], [value]
    while waiting:
        holder = waiting.pop()
        for key, item in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            places.append((holder, key))
            if isinstance(item, dict | list):
                waiting.append(item)
    return places


@dataclass(frozen=True, kw_only=True)
class Target:
    """`run` raises nothing but a ReproError; `seeds` are inputs to start from."""

    run: Callable[[bytes], object]
    seeds: Sequence[bytes] = ()


RECORDS = [path.read_bytes() for path in sorted(STORE.glob("*.json"))]
BUNDLE = bundle_of(canonical.loads((STORE / f"{SIGNED}.json").read_bytes()))
SMALL = small.small_bundle()
PLAN = parse_plan(SMALL["plan.json"], name="plan")
EVIDENCE = small.evidence(PLAN)
PROOF = inclusion.make_proof(SMALL, file=jobs(PLAN)[0].file, line=1)
TRACE = next(data for name, data in SMALL.items() if name.endswith("trace.jsonl"))
KEYS = (ROOT / "records/data/keys.json").read_bytes()


def _json(data: bytes) -> None:
    value = canonical.loads(data)
    again = canonical.dumps(value)
    assert canonical.loads(again) == value, "what was written reads back as it was"
    assert canonical.encode_parsed(value) == again


def _document(data: bytes) -> None:
    _verdict(document.verify_document(data, target="x", trusted=pinned()))


def _verdict(found: Verification) -> None:
    assert found.state in ("trusted", "valid", "invalid", "malformed", "indeterminate")
    json.dumps(found.to_json())


def _bulk(data: bytes) -> None:
    """The quick way of a batch and the general one agree."""
    if b"\n" not in data and data.strip():
        (line,) = LineVerifier(trusted=pinned(), name="x").lines([data], 1)
        found, single = (
            json.loads(line),
            document.verify_document(data, target=json.loads(line)["target"], trusted=pinned()),
        )
        assert found == single.to_json(), "a batch says what a single verification says"


def _zip(data: bytes) -> None:
    files = package.read_bundle(data)
    package.check_manifest(files)
    assert package.read_bundle(package.zip_bytes(files)) == files


def _trace(data: bytes) -> None:
    entries, head = check_chain(data, "00" * 32)
    assert len(head) == 64
    assert isinstance(entries, list)


def _evidence(data: bytes) -> None:
    """Entries changed, every chain made anew: what stands behind the hashes."""
    found = edited(EVIDENCE, Choices(data))
    files: dict[str, bytes] = {}
    for job in jobs(PLAN):
        head = "00" * 32
        for name, start in ((f"{job.segments[0].folder}/trace.jsonl", None), (job.file, job.digest)):
            entries = found.get(name) if isinstance(found, dict) else None
            if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
                begin = genesis(plan_digest(PLAN), job.segments[0].digest) if start is None else genesis(head, start)
                files[name], head = small.chained(entries, begin)
    loaded = load(PLAN, files)
    judge(PLAN, loaded.evidence)
    inclusion.evidence_tree(files)


def _plan(data: bytes) -> None:
    plan = parse_plan(canonical.dumps(edited(PLAN, Choices(data))), name="plan")
    list(jobs(plan))
    load(plan, SMALL)
    judge(plan, load(PLAN, SMALL).evidence)


def _bundle(data: bytes) -> None:
    """Plan, outcome, evidence and statement changed, and sealed again."""
    choices = Choices(data)
    which = choices.below(4)
    plan, found = dict(PLAN), EVIDENCE
    outcome = canonical.loads(SMALL["outcome.json"])
    if which == 0:
        plan = edited(plan, choices)
        plan = parse_plan(canonical.dumps(plan), name="plan")
    files = {"plan.json": canonical.dumps(plan), "outcome.json": canonical.dumps(outcome)}
    if which == 1:
        files["outcome.json"] = canonical.dumps(edited(outcome, choices))
    if which == 2:
        found = edited(found, choices)
    try:
        files |= small.traced(plan, found)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError):
        return  # the maker's own trouble with what it was given
    sealed = small.sealed(files, verdicts=summary(outcome))
    if which == 3:
        said = statement.open_envelope(sealed["statement.dsse.json"]).statement
        sealed["statement.dsse.json"] = statement.sign_envelope(edited(said, choices), small.KEY)
    _verdict(workflow_bundle.verify(sealed, target="x", trusted=pinned()))


def _envelope(data: bytes) -> None:
    envelope = statement.open_envelope(data)
    statement.verify_envelope(envelope, trusted=pinned(), at="2026-11-21T22:00:00Z")


def _statement(data: bytes) -> None:
    said = statement.open_envelope(SMALL["statement.dsse.json"]).statement
    files = SMALL | {"statement.dsse.json": statement.sign_envelope(edited(said, Choices(data)), small.KEY)}
    _verdict(replication.verify_replication(files, trusted=pinned()))


def _manifest(data: bytes) -> None:
    package.check_manifest(SMALL | {"manifest.json": data})


def _merge(data: bytes) -> None:
    choices = Choices(data)
    merge.merge_bundles([edited(BUNDLE, choices), BUNDLE], trusted=pinned()).to_bytes()


def _proof(data: bytes) -> None:
    _verdict(prove.verify(data, trusted=pinned()))


def _proof_edited(data: bytes) -> None:
    _proof(canonical.dumps(edited(canonical.loads(PROOF), Choices(data))))


def _document_edited(data: bytes) -> None:
    choices = Choices(data)
    seeds = [canonical.loads(RECORDS[0]), BUNDLE]
    _document(canonical.dumps(edited(seeds[choices.below(2)], choices)))


def _said(statement_bytes: bytes, choices: Choices) -> bytes:
    """A statement of ours, its predicate changed, signed anew."""
    said = statement.open_envelope(statement_bytes).statement
    return statement.sign_envelope(said | {"predicate": edited(said["predicate"], choices)}, small.KEY)


def _audit(data: bytes) -> None:
    _verdict(audit.verify_audit(data, trusted=pinned()))
    audit.merge_audits([data, AUDIT], manifest_sha256=canonical.sha256_hex(SMALL["manifest.json"]), trusted=pinned())
    workflow_audit.check_draw(PLAN, SMALL, audit.read_audit(data))


def _signed(data: bytes) -> None:
    _verdict(signed.verify_signed(data, trusted=pinned()))
    signed.check_signed({signed.SIGNED_PLAN: data}, PLAN, trusted=pinned())
    here = {name: PLAN[name] for name in ("code", "corpora", "environment")}
    signed.check_signed({signed.SIGNED_PLAN: data}, signed.deviated(PLAN, here, "why"), trusted=pinned())


def _timestamp(data: bytes) -> None:
    timestamps.check_proof(DATA, data, headers={800_000: bytes(80)})


def _made_audit() -> bytes:
    drawn = workflow_audit.draw(PLAN, arms=1, segments=2, seed=3)
    items = [
        {"arm": job.arm, "seed": job.seed, "segment": None, "steps": None} for job in drawn.arms
    ] + [
        {"arm": s.job.arm, "seed": s.job.seed, "segment": s.number + 1, "steps": [s.first, s.last]} for s in drawn.stretches
    ]  # fmt: skip
    rest = {"agreement": "bitwise", "difference": "0.0", "lines": 4, "not_compared": []}
    said = {
        "schema": audit.AUDIT_SCHEMA,
        "statement_sha256": canonical.sha256_hex(replication.read_statement(SMALL).payload),
        "plan_sha256": plan_digest(PLAN),
        "draw": {"seed": 3, "arms": 1, "segments": 2},
        "rule": "bitwise",
        "differing": [],
        "tolerance": PLAN["tolerance"],
        "items": [item | rest for item in items],
        **{name: {} for name in ("environment", "code", "cost")},
        "finished_at": "2026-11-22T01:00:00Z",
    }
    return audit.sign_audit(said, manifest_sha256=canonical.sha256_hex(SMALL["manifest.json"]), key=small.KEY)


AUDIT = _made_audit()
SIGNED_PLAN = signed.sign_plan(PLAN, key=small.KEY, signed_at="2026-11-22T01:00:00Z")
STAMPED = [proof(PendingAttestation("https://a.example")), proof(BitcoinBlockHeaderAttestation(800_000))]

_DRIVERS = [bytes(range(n, n + 24)) for n in range(0, 230, 11)]

TARGETS: dict[str, Target] = {
    "json": Target(run=_json, seeds=[RECORDS[0], b'{"a":["\\u00e9",-1,true,null]}']),
    "document": Target(run=_document, seeds=[*RECORDS, canonical.dumps(BUNDLE), KEYS]),
    "document-edit": Target(run=_document_edited, seeds=_DRIVERS),
    "bulk-line": Target(run=_bulk, seeds=[canonical.dumps(canonical.loads(data)) for data in RECORDS]),
    "merge-edit": Target(run=_merge, seeds=_DRIVERS),
    "keys": Target(run=lambda data: parse_public_keys(data, source="file"), seeds=[KEYS, SMALL["signing-key.json"]]),
    "number": Target(
        run=lambda data: parse_reference(data.decode("utf-8", "replace")),
        seeds=[b"pith:2026:X72AYRLPIFP2UVYVUQLNZSTJUW", b"arxiv:2509.21892v2", b"doi:10.48550/arxiv.2509.21892"],
    ),
    "zip": Target(run=_zip, seeds=[package.zip_bytes({"a": b"x" * 9, "b/c.json": b"{}"}), package.zip_bytes(SMALL)]),
    "manifest": Target(run=_manifest, seeds=[SMALL["manifest.json"]]),
    "envelope": Target(run=_envelope, seeds=[SMALL["statement.dsse.json"]]),
    "statement-edit": Target(run=_statement, seeds=_DRIVERS),
    "trace": Target(run=_trace, seeds=[small.chained([{"type": "end", "steps": 1}], "00" * 32)[0], TRACE]),
    "evidence-edit": Target(run=_evidence, seeds=_DRIVERS),
    "plan": Target(run=lambda data: parse_plan(data, name="plan"), seeds=[SMALL["plan.json"]]),
    "plan-edit": Target(run=_plan, seeds=_DRIVERS),
    "bundle-edit": Target(run=_bundle, seeds=_DRIVERS),
    "proof": Target(run=_proof, seeds=[PROOF]),
    "proof-edit": Target(run=_proof_edited, seeds=_DRIVERS),
    "audit": Target(run=_audit, seeds=[AUDIT]),
    "audit-edit": Target(run=lambda data: _audit(_said(AUDIT, Choices(data))), seeds=_DRIVERS),
    "signed-plan": Target(run=_signed, seeds=[SIGNED_PLAN]),
    "signed-plan-edit": Target(run=lambda data: _signed(_said(SIGNED_PLAN, Choices(data))), seeds=_DRIVERS),
    "timestamp": Target(run=_timestamp, seeds=STAMPED),
}


def run(target: Target, data: bytes) -> None:
    """One input; anything that is raised is a finding."""
    with contextlib.suppress(ReproError):
        target.run(data)
