"""Every error that a user of the package can meet, each with the exit code that the CLI gives it.

A message says what was expected, what was found and what to do next, in one line. Parsers raise nothing else: a leaked
KeyError, ValueError or RecursionError is a bug.
"""

from typing import ClassVar


class ReproError(Exception):
    """Root of all errors of `repro`, `records` and `papers`; `exit_code` is what the CLI exits with."""

    exit_code: ClassVar[int] = 1


class InvalidError(ReproError):
    """Proven bad: a hash, signature, chain or verdict does not hold (exit code 1)."""


class UsageError(ReproError):
    """The request itself cannot be carried out: unknown name, missing extra, unusable path (exit code 2)."""

    exit_code = 2


class MalformedError(ReproError):
    """The bytes are not a document that this version can read (exit code 3)."""

    exit_code = 3


class UnsupportedError(MalformedError):
    """The bytes are of another version of one of our formats, one that this version cannot read (exit code 3)."""


class IndeterminateError(ReproError):
    """Nothing was proven either way: ambiguous, not found, or a trust asked for and not shown (exit code 4)."""

    exit_code = 4


class NetworkError(ReproError):
    """The network was needed and did not answer as it should (exit code 5)."""

    exit_code = 5


class InternalError(ReproError):
    """A fault of ours, not of the input (exit code 70, as sysexits.h has it); the message asks for a report."""

    exit_code = 70
