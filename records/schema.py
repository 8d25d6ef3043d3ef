"""The JSON Schemas (draft 2020-12) of the documents, and every fault that a document has against its own.

jsonschema is imported when a foreign document is read, and not before: the package's own records are validated by its
tests.
"""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

FILE: Final = Path(__file__).parent / "schemas" / "pith.json"
MAX_FAULTS: Final = 20

Predicate = Callable[[Any], bool]


@cache
def validator(form: str) -> "Draft202012Validator":
    """The validator of one form of document: a definition of schemas/pith.json."""
    from jsonschema import Draft202012Validator

    whole = json.loads(FILE.read_bytes())
    return Draft202012Validator({"$schema": whole["$schema"], "$ref": f"#/$defs/{form}", "$defs": whole["$defs"]})


def faults(form: str, value: object) -> list[str]:
    """Every fault of `value` against the schema of `form`, in the document's order, each one line; at most 20."""
    found: list[str] = []
    for error in validator(form).iter_errors(value):
        if len(found) == MAX_FAULTS:
            found.append("and more faults, not listed")
            break
        # The message quotes the document: one short line of it, and no control characters.
        message = re.sub(r"[^ -~]+", "?", error.message[:200])
        found.append(f"{error.json_path[:120]}: {message}" if error.json_path.isprintable() else message)
    return found


@cache
def predicate(form: str) -> Predicate:
    """A function that says whether a parsed value fits the schema of `form`: what jsonschema says, without the reasons.

    It exists for bulk verification, where jsonschema would take most of the time, and is compiled from the same file;
    the tests hold it against jsonschema. Only the keywords that the file uses are known, any other is an error here.
    """
    definitions = json.loads(FILE.read_bytes())["$defs"]
    return _compiled({"$ref": f"#/$defs/{form}"}, definitions)


def _compiled(node: dict[str, Any], definitions: dict[str, Any]) -> Predicate:
    if "$ref" in node:
        return _compiled(definitions[node["$ref"].removeprefix("#/$defs/")], definitions)
    tests = [_test(keyword, node, definitions) for keyword in node if keyword not in _READ_WITH_OTHERS]
    if len(tests) == 1:
        return tests[0]

    def every(value: Any) -> bool:
        for test in tests:  # noqa: SIM110 - a generator would take half of the time
            if not test(value):
                return False
        return True

    return every


_READ_WITH_OTHERS: Final = frozenset({"additionalProperties", "else"})
_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "null": (type(None),),
}  # fmt: skip


def _test(keyword: str, node: dict[str, Any], definitions: dict[str, Any]) -> Predicate:
    """The test of one keyword; like all of JSON Schema, it holds for values of the types that it says nothing of."""
    expected = node[keyword]
    if keyword == "type":
        kinds = _TYPES[expected]
        return lambda value: type(value) in kinds
    if keyword == "const":
        return lambda value: type(value) is type(expected) and value == expected
    if keyword == "pattern":
        search = re.compile(expected).search
        return lambda value: not isinstance(value, str) or search(value) is not None
    if keyword in ("minLength", "maxLength", "minimum", "maxItems"):
        return _limit(keyword, expected)
    if keyword == "required":
        names = tuple(expected)
        return lambda value: not isinstance(value, dict) or all(name in value for name in names)
    if keyword == "items":
        item = _compiled(expected, definitions)
        return lambda value: not isinstance(value, list) or all(item(entry) for entry in value)
    if keyword == "if":
        condition, otherwise = _compiled(expected, definitions), _compiled(node["else"], definitions)
        return lambda value: condition(value) or otherwise(value)
    if keyword == "anyOf":
        choices = [_compiled(choice, definitions) for choice in expected]
        return lambda value: any(choice(value) for choice in choices)
    if keyword == "properties":
        known = {name: _compiled(inner, definitions) for name, inner in expected.items()}
        closed = node.get("additionalProperties") is False

        def properties(value: Any) -> bool:
            if isinstance(value, dict):
                for name, inner in value.items():
                    test = known.get(name)
                    if closed if test is None else not test(inner):
                        return False
            return True

        return properties
    raise NotImplementedError(f"schemas/pith.json uses the keyword {keyword!r}, which `predicate` does not know")


def _limit(keyword: str, limit: int) -> Predicate:
    if keyword == "minLength":
        return lambda value: not isinstance(value, str) or len(value) >= limit
    if keyword == "maxLength":
        return lambda value: not isinstance(value, str) or len(value) <= limit
    if keyword == "maxItems":
        return lambda value: not isinstance(value, list) or len(value) <= limit
    return lambda value: type(value) is not int or value >= limit
