"""Versions of our own formats: each names itself and its version, `repro.plan/v1`, and a reader says which it reads.

A version is never changed once something was published in it: the fixtures in tests/fixtures/formats are read for ever.
"""

import re

from records.errors import MalformedError, UnsupportedError

_VERSION = re.compile(r"(.+[/:]v)[0-9]{1,6}")


def check_version(found: object, *known: str, what: str) -> None:
    """Raises UnsupportedError where `found` is another version of a format that is `known`, MalformedError where it is none.

    Args:
        found: what stands in the document; any value.
        known: the versions that the caller reads, like `repro.plan/v1`.
        what: the document and its kind, for the message: `plan.json: expected a plan of the form`.
    """
    if found in known:
        return
    message = f"{what} {' or '.join(known)}, found {str(found)[:60]!a}"
    if is_other_version(found, *known):
        raise UnsupportedError(f"{message}: another version of the format, which this version of repro cannot read")
    raise MalformedError(message)


def is_other_version(found: object, *known: str) -> bool:
    """Whether `found` names a format that is `known`, in a version that is not."""
    if not isinstance(found, str) or found in known:
        return False
    match = _VERSION.fullmatch(found)
    return match is not None and any(match[1] == known_as[: len(match[1])] for known_as in known)
