"""The JSON Schemas (draft 2020-12) of the documents, and every fault that a document has against its own.

jsonschema is imported when a foreign document is read, and not before: the package's own records are validated by its
tests.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

FILE: Final = Path(__file__).parent / "schemas" / "pith.json"
MAX_FAULTS: Final = 20


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
