"""A Merkle commitment over a run's evidence, and proofs that one piece of it was committed to.

- `pieces`: the evidence files cut after every committed weight hash; a piece is a leaf of the tree
- `evidence_tree`: root and size, which stand in the signed statement of a replication
- `make_proof`, `read_proof`, `verify_proof`: one piece with its path and the signed statement, checked without the rest

docs/replication-record.md, section 9, is normative.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from records import canonical
from records.errors import MalformedError, ReproError, UsageError
from records.fields import is_sha256
from records.keys import KeySet, parse_public_key
from records.merkle import inclusion_path, leaf_hash, root_of_path, tree_root
from records.package import STATEMENT, check_name
from records.replication import PLAN, PUBLIC_KEY, statement_faults
from records.report import Check, Verification
from records.statement import Envelope, open_envelope, verify_envelope
from records.versions import check_version

PROOF_SCHEMA: Final = "repro.inclusion/v1"
ALGORITHM: Final = "rfc6962-sha256"
EVIDENCE_TREE: Final = "evidence_tree"
_DOMAIN: Final = b"repro.evidence-leaf/v1\0"
_MAX_PATH: Final = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Consecutive lines of an evidence file, up to and with one that holds a weight hash, or up to the file's end.

    `line` is the number of the first (from 1), `previous` the chain value of the line before it, None for the first.
    """

    file: str
    line: int
    previous: str | None
    lines: bytes

    @property
    def leaf(self) -> bytes:
        """Hash of the leaf, 32 bytes: over the domain, what says where the piece stands, and its lines."""
        place = {"file": self.file, "line": self.line, "previous": self.previous}
        return leaf_hash(_DOMAIN + canonical.dumps(place) + b"\n" + self.lines)

    def entries(self) -> list[dict[str, Any]]:
        """The entries of the lines; MalformedError where a line is not an object of chain and entry."""
        return [_line(line, self.file)["entry"] for line in self.lines.splitlines()]


def pieces(files: Mapping[str, bytes]) -> list[Piece]:
    """The pieces of every chained file of a bundle, by file name and line; other files are left out.

    Raises MalformedError for a line that is not an object of chain and entry.
    """
    return [
        piece
        for name in sorted(files)
        if name.endswith(".jsonl") and name.startswith(("segments/", "arms/")) and not name.endswith("/timing.jsonl")
        for piece in _cut(name, files[name])
    ]


def _cut(name: str, data: bytes) -> Iterator[Piece]:
    lines = data.splitlines(keepends=True)
    first, previous = 0, None
    for number, line in enumerate(lines, start=1):
        # Only a line in which the word stands is parsed: the test costs nothing, and what parses decides.
        ends = b'"weights"' in line and "weights" in _line(line, name)["entry"]
        if ends or number == len(lines):
            yield Piece(file=name, line=first + 1, previous=previous, lines=b"".join(lines[first:number]))
            first, previous = number, _line(line, name)["chain"]


def _line(data: bytes, name: str) -> dict[str, Any]:
    try:
        value = canonical.loads(data)
    except ReproError as error:
        raise MalformedError(f"{name}: {error}") from error
    if not isinstance(value, dict) or set(value) != {"chain", "entry"} or not isinstance(value["entry"], dict):
        raise MalformedError(f"{name}: expected each line as an object of chain and entry")
    if not is_sha256(value["chain"]):
        raise MalformedError(f"{name}: expected 64 lower-case hex digits under chain")
    return value


def evidence_tree(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What a statement says of the tree over the evidence in `files`; raises what `pieces` does."""
    leaves = [piece.leaf for piece in pieces(files)]
    return {"algorithm": ALGORITHM, "leaves": len(leaves), "root": tree_root(leaves).hex()}


def tree_check(files: Mapping[str, bytes], predicate: Mapping[str, Any]) -> Check:
    """The check `evidence_tree` of a bundle; a statement older than the tree says nothing of it, and is none the worse."""
    stated = predicate.get(EVIDENCE_TREE)
    if stated is None:
        return Check(code=EVIDENCE_TREE, status="skip", detail="the statement commits to no tree over the evidence")
    try:
        found = evidence_tree(files)
    except MalformedError as error:
        return Check(code=EVIDENCE_TREE, status="fail", detail=str(error))
    if found != stated:
        detail = f"the tree over the evidence has the root {found['root']}, the statement says otherwise"
        return Check(code=EVIDENCE_TREE, status="fail", detail=detail)
    detail = f"{found['leaves']} pieces of evidence under one root, that of the statement"
    return Check(code=EVIDENCE_TREE, status="pass", detail=detail)


def make_proof(files: Mapping[str, bytes], *, file: str, line: int) -> bytes:
    """The proof, as canonical JSON, for the piece that holds `line` (from 1) of the evidence file `file`.

    Raises UsageError where the bundle commits to no tree or holds no such line.
    """
    statement = open_envelope(files[STATEMENT]).statement
    if statement["predicate"].get(EVIDENCE_TREE) is None:
        raise UsageError("the bundle's statement commits to no tree over its evidence: it is older than proofs")
    found = pieces(files)
    holds = [n for n, item in enumerate(found) if item.file == file and 0 <= line - item.line < item.lines.count(b"\n")]
    if not holds:
        raise UsageError(f"expected a line of the bundle's evidence, found none at {file} line {line}")
    index, piece = holds[0], found[holds[0]]
    piece.entries()  # raises what the statement's signer should have: the text below has to be JSON lines
    path = inclusion_path([item.leaf for item in found], index)
    proof = {
        "schema": PROOF_SCHEMA,
        "plan": canonical.loads(files[PLAN]),
        "statement": canonical.loads(files[STATEMENT]),
        "key": canonical.loads(files[PUBLIC_KEY]) if PUBLIC_KEY in files else None,
        "piece": {
            "file": piece.file,
            "line": piece.line,
            "previous": piece.previous,
            "lines": piece.lines.decode("utf-8"),
        },
        "index": index,
        "path": [sibling.hex() for sibling in path],
    }
    return canonical.dumps(proof)


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """A parsed proof: the signed statement, the key and the plan that came along, the piece, its place and its path."""

    envelope: Envelope
    key: Any
    plan: Any
    piece: Piece
    index: int
    path: tuple[bytes, ...]


def read_proof(data: bytes) -> Proof:
    """The proof in `data`; MalformedError where it has another form."""
    value = canonical.loads(data)
    expected = {"schema", "statement", "key", "plan", "piece", "index", "path"}
    if not isinstance(value, dict):
        raise MalformedError(f"inclusion proof: expected an object, found {type(value).__name__}")
    check_version(value.get("schema"), PROOF_SCHEMA, what="inclusion proof: expected the form")
    if set(value) != expected:
        raise MalformedError(f"inclusion proof: expected exactly the fields {', '.join(sorted(expected))}")
    piece, path, index = value["piece"], value["path"], value["index"]
    if not isinstance(piece, dict) or set(piece) != {"file", "line", "previous", "lines"}:
        raise MalformedError("inclusion proof: expected piece with file, line, previous and lines")
    if not isinstance(piece["file"], str) or not isinstance(piece["lines"], str) or not piece["lines"]:
        raise MalformedError("inclusion proof: expected texts under piece.file and piece.lines")
    if type(piece["line"]) is not int or piece["line"] < 1 or type(index) is not int or index < 0:
        raise MalformedError("inclusion proof: expected piece.line of at least 1 and index of at least 0")
    if piece["previous"] is not None and not is_sha256(piece["previous"]):
        raise MalformedError("inclusion proof: expected a chain value or null under piece.previous")
    if (piece["previous"] is None) != (piece["line"] == 1):
        raise MalformedError("inclusion proof: expected a chain value before every line but the first")
    if not isinstance(path, list) or len(path) > _MAX_PATH or not all(is_sha256(sibling) for sibling in path):
        raise MalformedError(f"inclusion proof: expected path as at most {_MAX_PATH} SHA-256 digests")
    envelope = open_envelope(canonical.dumps(value["statement"]))
    return Proof(
        envelope=envelope,
        key=value["key"],
        plan=value["plan"],
        piece=Piece(
            file=check_name(piece["file"]),
            line=piece["line"],
            previous=piece["previous"],
            lines=piece["lines"].encode("utf-8"),
        ),
        index=index,
        path=tuple(bytes.fromhex(sibling) for sibling in path),
    )


def verify_proof(data: bytes, *, trusted: KeySet, target: str = "-") -> Verification:
    """The checks `strict_json schema envelope_signature key_trust plan evidence_tree trace` of a proof.

    Never raises for what is in `data`. Which arm the piece belongs to is for a reader of plans to say.
    """
    found = Verification(target=target, kind="inclusion_proof")
    try:
        proof = read_proof(data)
        faults = statement_faults(proof.envelope.statement)
        if faults:
            raise MalformedError("; ".join(faults))
        tree = _tree_of(proof.envelope.statement["predicate"])
        keys = [] if proof.key is None else [parse_public_key(proof.key, source="document")]
        entries = proof.piece.entries()
    except MalformedError as error:
        code = "strict_json" if str(error).startswith("strict JSON") else "schema"
        return found.with_checks(Check(code=code, status="fail", detail=str(error)))
    except ReproError as error:
        return found.with_checks(Check(code="schema", status="fail", detail=str(error)))
    predicate = proof.envelope.statement["predicate"]
    checks, trust = verify_envelope(proof.envelope, trusted=trusted, document_keys=keys, at=predicate["finished_at"])
    checks = [
        Check(code="strict_json", status="pass", detail="strict JSON"),
        Check(code="schema", status="pass", detail=f"an inclusion proof, {PROOF_SCHEMA}"),
        *checks,
        _planned(proof),
        _included(proof, tree),
        _linked(proof.piece, len(entries)),
    ]
    name = proof.envelope.statement["subject"][0]["name"]
    number = name if name.startswith("pith:") else None
    return Verification(target=target, kind=found.kind, pith_number=number, checks=tuple(checks), trust=trust)


def _tree_of(predicate: Mapping[str, Any]) -> tuple[bytes, int]:
    """Root and size of the tree that a statement commits to."""
    tree = predicate.get(EVIDENCE_TREE)
    if not isinstance(tree, dict) or set(tree) != {"algorithm", "leaves", "root"} or tree["algorithm"] != ALGORITHM:
        raise MalformedError(f"inclusion proof: expected a statement with {EVIDENCE_TREE}, {ALGORITHM}")
    if type(tree["leaves"]) is not int or tree["leaves"] < 1 or not is_sha256(tree["root"]):
        raise MalformedError(f"inclusion proof: expected a root over at least one leaf under {EVIDENCE_TREE}")
    return bytes.fromhex(tree["root"]), tree["leaves"]


def _planned(proof: Proof) -> Check:
    expected, found = proof.envelope.statement["predicate"]["plan_sha256"], canonical.digest(proof.plan)
    if found != expected:
        return Check(
            code="plan",
            status="fail",
            detail=f"the plan has SHA-256 {found}, the statement's plan_sha256 is {expected}",
        )
    return Check(code="plan", status="pass", detail="the plan is the one that the statement names")


def _included(proof: Proof, tree: tuple[bytes, int]) -> Check:
    root, size = tree
    try:
        found = root_of_path(proof.piece.leaf, index=proof.index, size=size, path=proof.path)
    except MalformedError as error:
        return Check(code=EVIDENCE_TREE, status="fail", detail=str(error))
    if found != root:
        detail = f"the path leads to the root {found.hex()}, the statement's is {root.hex()}"
        return Check(code=EVIDENCE_TREE, status="fail", detail=detail)
    last = proof.piece.line + proof.piece.lines.count(b"\n") - 1
    detail = f"{proof.piece.file}, lines {proof.piece.line} to {last}, is leaf {proof.index} of {size} under the root"
    return Check(code=EVIDENCE_TREE, status="pass", detail=detail)


def _linked(piece: Piece, count: int) -> Check:
    """The chain within the piece: from the line before it, or, in the first piece of a file, from its first line."""
    head = piece.previous
    for number, data in enumerate(piece.lines.splitlines(), start=piece.line):
        line = _line(data, piece.file)
        if head is not None:
            linked = canonical.sha256_hex(bytes.fromhex(head) + canonical.dumps(line["entry"]))
            if linked != line["chain"]:
                detail = f"{piece.file} line {number}: the chain is broken"
                return Check(code="trace", status="fail", detail=detail)
        head = line["chain"]
    detail = f"{count} lines, each linked to the one before it"
    return Check(code="trace", status="pass", detail=detail)
