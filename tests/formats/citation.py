"""Validates CITATION.cff against the Citation File Format's own schema, which the package cffconvert carries.

Run by `nox -s formats`. cffconvert itself asks for an old jsonschema; its schema does not, so that it is installed without its
dependencies and never imported.
"""

import importlib.util
import json
import sys
from pathlib import Path

import jsonschema
import yaml

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Prints every fault; 1 where there is one."""
    spec = importlib.util.find_spec("cffconvert")
    assert spec is not None and spec.origin is not None
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    schema = Path(spec.origin).parent / "schemas" / citation["cff-version"] / "schema.json"
    validator = jsonschema.validators.validator_for(found := json.loads(schema.read_bytes()))(found)
    faults = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(citation)]
    print("\n".join(faults) or f"CITATION.cff conforms to the Citation File Format {citation['cff-version']}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
