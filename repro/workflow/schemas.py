"""JSON Schemas (draft 2020-12) of our formats, made from the code that reads them; docs/schemas holds them as files.

- `schemas`: by file name; what a reader here takes also fits, and most of what it refuses does not: rules between fields
  (hash chains, criteria that contradict themselves) are beyond a schema
- the plan's is derived from its dataclasses, so that a new field is in it at once; the others are written out here
"""

import dataclasses
import json
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from records import audit, inclusion, replication, report, schema
from records.number import FULL_NUMBER
from records.package import MANIFEST_SCHEMA
from records.statement import MAX_SIGNATURES, PAYLOAD_TYPE, STATEMENT_TYPE
from repro.config import DECIMAL
from repro.judge import INCONCLUSIVE, NOT_REPLICATED, NOT_TESTED, OUTCOME_SCHEMA, REPLICATED
from repro.workflow import plan, signed
from repro.workflow.run import RUN_SCHEMA

Schema = dict[str, Any]

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_DEFINITIONS: dict[str, Schema] = {
    "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$", "maxLength": 64},
    "decimal": {"type": "string", "pattern": f"^{DECIMAL.pattern}$", "maxLength": 442},
    "time": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}", "maxLength": 40},
    "texts": {"type": "array", "items": {"type": "string"}},
    "count": {"type": "integer", "minimum": 0},
}


def schemas() -> dict[str, bytes]:
    """The files of docs/schemas by name; pith.json is the one that `records` validates with."""
    made = {
        "plan": _plan(),
        "outcome": _outcome(),
        "run": _run(),
        "trace-line": _trace_line(),
        "timing-line": _timing_line(),
        "manifest": _manifest(),
        "envelope": _envelope(),
        "replication": _statement(_replication(), replication.PREDICATE_TYPE),
        "inclusion": _inclusion(),
        "audit": _statement(_audit(), audit.AUDIT_TYPE),
        "signed-plan": _statement(_signed_plan(), signed.PLAN_TYPE),
        "verify": _verify(),
    }
    files = {f"{name}.json": _file(name, made) for name, made in made.items()}
    return files | {schema.FILE.name: schema.FILE.read_bytes()}


def _file(name: str, made: Schema) -> bytes:
    used: dict[str, Schema] = {}
    waiting = [made]
    while waiting:
        text = json.dumps(waiting.pop())
        for definition, value in _DEFINITIONS.items():
            if f'"#/$defs/{definition}"' in text and definition not in used:
                used[definition] = value
                waiting.append(value)
    definitions = {**used, **made.pop("$defs", {})}
    head = {"$schema": _DRAFT, "$id": f"urn:pith-repro:schema:{name}:{made.pop('version')}"}
    whole = head | made | ({"$defs": dict(sorted(definitions.items()))} if definitions else {})
    return (json.dumps(whole, indent=1, ensure_ascii=False) + "\n").encode()


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _object(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None, **more: Any) -> Schema:
    """An object of these fields and no others, but where `additionalProperties` says so."""
    properties = {**required, **(optional or {})}
    closed = {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
    return closed | more


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _maybe(value: Schema) -> Schema:
    return {"anyOf": [value, {"type": "null"}]}


_TEXT: Schema = {"type": "string"}
_ANY: Schema = {"type": "object"}
_INTEGER: Schema = {"type": "integer"}


def _plan() -> Schema:
    definitions: dict[str, Schema] = {}
    made = _of_class(plan._PlanRecord, definitions)
    made["properties"] |= {
        "schema": {"const": plan.PLAN_SCHEMA},
        "seeds": _list(_INTEGER, minItems=1, uniqueItems=True),
        "corpora": {"type": "object", "additionalProperties": _TEXT},
        "code": {"type": "object", "properties": {"sha256": _TEXT}, "required": ["sha256"]},
    }
    positive = {"type": "integer", "minimum": 1}
    train = {"type": "object", "properties": dict.fromkeys(plan._TRAIN_COUNTS, positive),
             "required": list(plan._TRAIN_COUNTS)}  # fmt: skip
    segment = {"type": "object", "properties": {"train": train, "corpus": _TEXT}, "required": ["train", "corpus"]}
    arm = definitions["ArmRecord"]["properties"]
    arm["id"] = {"type": "string", "pattern": f"^{plan._ARM_ID.pattern}$", "maxLength": 100}
    arm["segments"] = _list(segment, minItems=1)
    return {"version": "v1", "title": "plan.json: everything that decides a run"} | made | {"$defs": definitions}


def _of_class(kind: type, definitions: dict[str, Schema]) -> Schema:
    """What `repro.config.decode` takes for the dataclass `kind`; those within go to `definitions`."""
    hints = get_type_hints(kind)
    required: dict[str, Schema] = {}
    optional: dict[str, Schema] = {}
    for field in dataclasses.fields(kind):
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        (optional if has_default else required)[field.name] = _of(hints[field.name], definitions)
    return _object(required, optional)


def _of(hint: Any, definitions: dict[str, Schema]) -> Schema:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (inner,) = (arg for arg in args if arg is not type(None))
        return _maybe(_of(inner, definitions))
    if origin is tuple:
        return _list(_of(args[0], definitions))
    if origin is Literal:
        return {"enum": list(args)}
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        name = hint.__name__.lstrip("_")
        if name not in definitions:
            definitions[name] = {}  # a class may hold itself
            definitions[name] = _of_class(hint, definitions)
        return _ref(name)
    if hint is float:
        return {"anyOf": [_INTEGER, _ref("decimal")]}
    simple = {str: _TEXT, int: _INTEGER, bool: {"type": "boolean"}}
    return dict(simple.get(hint, _ANY))


def _numbers() -> dict[str, Schema]:
    return {
        "effect": _ref("decimal"),
        "interval": _list(_ref("decimal"), minItems=2, maxItems=2),
        "sd": _ref("decimal"),
        "p": _ref("decimal"),
        "d_z": {"anyOf": [_ref("decimal"), {"const": "infinite"}]},
        "n": _ref("count"),
    }


_VERDICTS = {"enum": [REPLICATED, NOT_REPLICATED, INCONCLUSIVE, NOT_TESTED]}


def _outcome() -> Schema:
    test = _object(
        {
            "role": {"enum": ["pass", "fail", "control"]},
            "test": _TEXT,
            "result": {"enum": ["holds", "fails", "not_computed"]},
        },
        {**_numbers(), "reason": _TEXT},
    )
    verdict = _object(
        {"claim": _TEXT, "verdict": _VERDICTS, "reason": _TEXT, "tests": _list(test)},
        {"scale": _TEXT, "seeds": _ref("count")},
    )
    return {"version": "v1", "title": "outcome.json: the verdicts, with the tests that they rest on"} | _object(
        {
            "schema": {"const": OUTCOME_SCHEMA},
            "plan_sha256": _ref("sha256"),
            "groups": {"type": "object", "additionalProperties": _TEXT},
            "verdicts": _list(verdict),
        }
    )


def _run() -> Schema:
    session = _object({"started_at": _ref("time"), "finished_at": _maybe(_ref("time"))}, additionalProperties=True)
    code = {"sha256": _ref("sha256"), "version": _TEXT, "commit": _maybe(_TEXT), "dirty": {"type": "boolean"}}
    return {"version": "v1", "title": "run.json: when, and from which checkout, a plan was executed"} | _object(
        {
            "schema": {"const": RUN_SCHEMA},
            "sessions": _list(session, minItems=1),
            "code": _object(code),
            "python": _TEXT,
            "cores": _ref("count"),
        },
        additionalProperties=True,
    )


def _trace_line() -> Schema:
    numbers = _list(_ref("decimal"))
    step, weights = _ref("count"), _ref("sha256")
    entries = {
        "step": _object(
            {"step": step, "tokens": step, "loss": _ref("decimal"), "grad_norm": _ref("decimal")}, {"weights": weights}
        ),
        "probe": _object(
            {"step": step, "load": _list(_list(step)), "values": {"type": "object", "additionalProperties": numbers}}
        ),
        "metric": _object({"name": _TEXT, "value": _ref("decimal")}),
        # a segment's end and an arm's; where a segment or a measure diverged, what is known of the place
        "end": {"anyOf": [_object({"steps": step, "weights": weights}), _object({"metrics": step})]},
        "diverged": {"type": "object"},
    }
    variants = []
    for kind, form in entries.items():
        for part in form.get("anyOf", [form]):
            closed = "properties" in part
            properties = {"type": {"const": kind}, **part.get("properties", {})}
            variants.append(
                {**part, "properties": properties, "required": ["type", *part.get("required", [])]}
                | ({} if closed else {"additionalProperties": True})
            )
    return {
        "version": "v1",
        "title": "a line of a trace: an entry, and the value of the hash chain after it",
    } | _object({"chain": _ref("sha256"), "entry": {"anyOf": variants}})


def _timing_line() -> Schema:
    seconds = {"type": "number", "minimum": 0}
    return {
        "version": "v1",
        "title": "a line of timing.jsonl: measured seconds of a step group, outside the chain",
    } | _object({"step": _ref("count"), "seconds": seconds}, {"cpu_seconds": seconds})


def _manifest() -> Schema:
    entry = _object({"sha256": _TEXT, "size": _INTEGER})
    return {"version": "v1", "title": "manifest.json: every file of a bundle, with size and SHA-256"} | _object(
        {"schema": {"const": MANIFEST_SCHEMA}, "files": {"type": "object", "additionalProperties": entry}}
    )


def _envelope() -> Schema:
    base64 = {"type": "string", "pattern": "^[A-Za-z0-9+/]*={0,2}$"}
    signature = _object({"keyid": _TEXT, "sig": {**base64, "minLength": 88, "maxLength": 88}})
    return {"version": "v1", "title": "a DSSE envelope with an in-toto statement"} | _object(
        {
            "payload": base64,
            "payloadType": {"const": PAYLOAD_TYPE},
            "signatures": _list(signature, maxItems=MAX_SIGNATURES),
        }
    )


def _statement(predicate: Schema, predicate_type: str) -> Schema:
    """A whole in-toto statement with the predicate: what is in the envelope's payload."""
    version, title = predicate.pop("version"), predicate.pop("title")
    subject_name = predicate.pop("subject_name")
    subject = _object({"name": subject_name, "digest": _object({"sha256": _ref("sha256")})}, additionalProperties=True)
    return {"version": version, "title": title} | _object(
        {
            "_type": {"const": STATEMENT_TYPE},
            "subject": _list(subject, minItems=1, maxItems=1),
            "predicateType": {"const": predicate_type},
            "predicate": predicate,
        }
    )


def _replication() -> Schema:
    verdict = _object({"claim": _TEXT, "verdict": _VERDICTS}, additionalProperties=True)
    tree = _object({"algorithm": {"const": inclusion.ALGORITHM}, "leaves": _ref("count"), "root": _ref("sha256")})
    name = f"^({FULL_NUMBER.pattern}|{replication._ARXIV_NAME.pattern})$"
    return {
        "version": "v1",
        "title": "a replication record: the signed statement that binds paper, plan, evidence and verdicts",
        "subject_name": {"type": "string", "pattern": name, "maxLength": 60},
    } | _object(
        {
            "schema": {"const": replication.PREDICATE_SCHEMA},
            "paper": _ANY,
            "scale": _TEXT,
            "plan_sha256": _ref("sha256"),
            "outcome_sha256": _ref("sha256"),
            "manifest_sha256": _ref("sha256"),
            "verdicts": _list(verdict, minItems=1),
            "environment": _ANY,
            "code": _object({"dirty": {"type": "boolean"}}, additionalProperties=True),
            "finished_at": _ref("time"),
        },
        {inclusion.EVIDENCE_TREE: _maybe(tree)},
        additionalProperties=True,
    )


def _inclusion() -> Schema:
    piece = _object(
        {
            "file": _TEXT,
            "line": {"type": "integer", "minimum": 1},
            "previous": _maybe(_ref("sha256")),
            "lines": _TEXT,
        }
    )
    return {"version": "v1", "title": "one piece of the evidence, with its path to the root that was signed"} | _object(
        {
            "schema": {"const": inclusion.PROOF_SCHEMA},
            "plan": _ANY,
            "statement": _ANY,
            "key": _maybe(_ANY),
            "piece": piece,
            "index": _ref("count"),
            "path": _list(_ref("sha256"), maxItems=inclusion._MAX_PATH),
        }
    )


def _signed_plan() -> Schema:
    return {
        "version": "v1",
        "title": "a plan that was signed before the run; what is under plan has a schema of its own",
        "subject_name": {"const": "plan.json"},
    } | _object(
        {
            "schema": {"const": signed.SIGNED_SCHEMA},
            "plan": _ANY,
            "key": _maybe(_ANY),
            "signed_at": _ref("time"),
        }
    )


def _audit() -> Schema:
    steps = _maybe(_list(_ref("count"), minItems=2, maxItems=2))
    difference = {"anyOf": [_ref("decimal"), {"const": "not comparable"}]}
    item = _object(
        {
            "arm": _TEXT,
            "seed": _ref("count"),
            "segment": _maybe({"type": "integer", "minimum": 1}),
            "steps": steps,
            "agreement": {"enum": list(audit.AGREEMENTS)},
            "difference": difference,
            "lines": _ref("count"),
            "not_compared": _ref("texts"),
        }
    )
    return {
        "version": "v2",
        "title": "an audit statement: parts of a replication, drawn and executed again, and how well they agreed",
        "subject_name": {"const": audit.SUBJECT},
    } | _object(
        {
            "schema": {"const": audit.AUDIT_SCHEMA},
            "statement_sha256": _ref("sha256"),
            "plan_sha256": _ref("sha256"),
            "draw": _object({name: _ref("count") for name in ("seed", "arms", "segments")}),
            "rule": {"enum": ["bitwise", "tolerance"]},
            "tolerance": _ANY,
            "differing": _ref("texts"),
            "items": _list(item, minItems=1, maxItems=audit.MAX_ITEMS),
            "environment": _ANY,
            "code": _ANY,
            "cost": _ANY,
            "auditor": _maybe(_ANY),
            "finished_at": _ref("time"),
        }
    )


def _verify() -> Schema:
    check = _object({"code": _TEXT, "status": {"enum": list(get_args(report.Status))}, "detail": _TEXT})
    trust = _object({"key_id": _maybe(_TEXT), "source": {"enum": list(get_args(report.Source))}})
    return {"version": "v1", "title": "what `repro verify --json` prints of a target"} | _object(
        {
            "schema": {"const": report.SCHEMA},
            "target": _TEXT,
            "kind": {"enum": list(get_args(report.Kind))},
            "state": {"enum": list(get_args(report.State))},
            "pith_number": _maybe(_TEXT),
            "checks": _list(check),
            "trust": trust,
        }
    )
