"""`repro verify`: what was proven of a record, a bundle or a replication, and what was not."""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from records.keys import KeySet
    from records.report import Check, Verification
    from records.resolver import Resolver

# Imports lie inside the functions: verifying a record of the package takes about as long as Python takes to start.

_LEGEND = """TARGET is one of
  a Pith number (full, or its first 8, 12 or 16 characters), arxiv:ID[vN], doi:10.48550/arxiv.ID
  a JSON file of Pith's (record, bundle, state, graph, key, mirror manifest), or - for standard input
  a replication bundle (zip or folder), a proof of one piece of it (repro prove), an audit of it, a signed plan;
    bundle and audits given together, what the audits say of the bundle is shown, too
  https://…"""
_COLOURS = {"trusted": "32", "valid": "32", "invalid": "31", "malformed": "31", "indeterminate": "33",
            "pass": "32", "fail": "31", "skip": "2"}  # fmt: skip
#: What a state says in words.
_MEANING = {
    "trusted": "everything that was checked holds, and the signing key is one that you trust",
    "valid": "everything that was checked holds; who vouches for it was not shown",
    "invalid": "proven bad",
    "malformed": "not a document that this version can read",
    "indeterminate": "nothing was proven either way",
}


def add_parser(subparsers: Any) -> None:
    """Add the command to `subparsers`."""
    command = subparsers.add_parser(
        "verify", help="verify Pith records and replication bundles", description=_LEGEND,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.add_argument("targets", nargs="+", metavar="TARGET")
    command.add_argument("--json", action="store_true", help="one JSON object a target on stdout, and nothing else")
    command.add_argument("--offline", action="store_true", help="open no socket: package and cache only")
    command.add_argument(
        "--refresh", action="store_true", help="ask mirrors and registry even where a local copy serves"
    )
    command.add_argument(
        "--trusted-keys", type=Path, metavar="FILE", help="a JSON public key, or a list of them, to trust"
    )
    command.add_argument(
        "--require", choices=("valid", "trusted"), default="valid", help="trusted: exit 4 when only valid"
    )
    command.add_argument("--batch", action="store_true", help="each TARGET is a JSONL file: a document a line")
    command.add_argument("--workers", type=int, metavar="N", help="processes for --batch (default: one a core)")
    command.add_argument("--max-bytes", type=int, metavar="N", help="largest JSON document (default: 16 MiB)")
    command.add_argument("--allow-rollback", action="store_true", help="accept a bundle with fewer events than before")
    command.add_argument(
        "--state", type=Path, metavar="FILE", help="a served state.json to compare merged bundles with"
    )
    command.add_argument(
        "--block-headers",
        type=Path,
        metavar="FILE",
        help="Bitcoin headers for FILE.ots: lines of height and 160 hex digits",
    )
    command.add_argument("-v", "--verbose", action="store_true", help="show the checks that were skipped, too")
    command.set_defaults(func=run)


@dataclass(kw_only=True)
class _Seen:
    """What the targets so far are needed for together: bundles of Pith to merge, replications, and audits of them."""

    keep_bundles: bool
    bundles: list[Any] = field(default_factory=list)
    replications: dict[str, dict[str, bytes]] = field(default_factory=dict)
    audits: list[bytes] = field(default_factory=list)
    headers: dict[int, bytes] = field(default_factory=dict)


def run(arguments: argparse.Namespace) -> int:
    """Verify every target; the exit code is the worst of them."""
    from records.canonical import MAX_BYTES
    from records.errors import ReproError, UsageError
    from records.keys import trusted_keys
    from records.network import Client
    from records.report import worst_exit_code
    from records.resolver import Resolver

    max_bytes = MAX_BYTES if arguments.max_bytes is None else arguments.max_bytes
    if max_bytes < 1 or (arguments.workers is not None and arguments.workers < 1):
        raise UsageError("expected --max-bytes and --workers of at least 1")
    trusted = trusted_keys(arguments.trusted_keys)
    if arguments.batch:
        from repro.cli.batch import run_batch

        return worst_exit_code([run_batch(target, arguments, trusted, max_bytes) for target in arguments.targets])
    resolver = Resolver(
        client=Client(offline=arguments.offline, max_bytes=max_bytes),
        trusted=trusted,
        refresh=arguments.refresh,
        allow_rollback=arguments.allow_rollback,
    )
    codes: list[int] = []
    seen = _Seen(keep_bundles=arguments.state is not None)
    if arguments.block_headers is not None:
        from records.timestamps import read_headers

        seen.headers = read_headers(arguments.block_headers)
    for target in arguments.targets:
        try:
            found, code = _verify(target, resolver, seen)
        except ReproError as error:
            # Only a request that cannot be carried out ends here: what was read always gives a verification.
            print(f"repro: error: {error}", file=sys.stderr)
            codes.append(error.exit_code)
            continue
        if found.state == "valid" and arguments.require == "trusted":
            code = 4
        codes.append(code)
        _show(found, arguments, code)
    if arguments.state is not None:
        codes.append(_compare(arguments.state, seen.bundles, max_bytes))
    codes += _merge_audits(seen, trusted, as_json=arguments.json)
    return worst_exit_code(codes)


def _verify(target: str, resolver: "Resolver", seen: "_Seen") -> "tuple[Verification, int]":
    """The verification of one target, and its exit code."""
    from records.errors import IndeterminateError, NetworkError
    from records.report import Check, Verification

    try:
        found = _dispatch(target, resolver, seen)
        found = found.with_checks(*_timestamps(target, seen))
    except (IndeterminateError, NetworkError) as error:
        check = Check(code="pith_number", status="skip", detail=str(error))
        return Verification(target=target, kind="pith_record", checks=(check,)), error.exit_code
    return found, found.exit_code


def _dispatch(target: str, resolver: "Resolver", seen: "_Seen") -> "Verification":
    from records.errors import UsageError
    from records.number import parse_reference

    scheme = target.partition(":")[0].lower() if ":" in target else ""
    if scheme in ("https", "http"):
        answer = resolver.client.get(target)
        if answer.content_type.startswith("text/html") and _asked_by_url(target):
            # The page of a number, the registry's or a mirror's: its bundle lies beside it.
            answer = resolver.client.get(target.split("?")[0].rstrip("/").removesuffix("/index.html") + "/bundle.json")
        if answer.status != 200:
            from records.errors import NetworkError

            raise NetworkError(f"{target[:200]} answers HTTP {answer.status}; check the address")
        return _document(answer.body, target, resolver, seen, from_network=True)
    path = Path(target)
    if target == "-":
        return _document(sys.stdin.buffer.read(resolver.client.max_bytes + 1), target, resolver, seen)
    if scheme not in ("pith", "arxiv", "doi") and (path.exists() or "/" in target or path.suffix):
        if path.is_dir():
            return _bundle(path, target, resolver, seen)
        try:
            with path.open("rb") as file:
                head = file.read(4)
                data = b"" if head == b"PK\x03\x04" else head + file.read(resolver.client.max_bytes + 1)
        except OSError as error:
            raise UsageError(f"cannot read {target}: {error.strerror or error}") from None
        return _bundle(path, target, resolver, seen) if not data else _document(data, target, resolver, seen)
    return resolver.verify(parse_reference(target), target=target)


def _document(
    data: bytes, target: str, resolver: "Resolver", seen: "_Seen", *, from_network: bool = False
) -> "Verification":
    from records.resolver import Candidate

    if data.startswith(b"PK\x03\x04"):
        return _bundle(data, target, resolver, seen)
    if b'"repro.inclusion/' in data:
        from repro.workflow import prove

        return prove.verify(data, target=target, trusted=resolver.trusted)
    if b'"payloadType"' in data and (signed := _envelope(data, target, resolver, seen)):
        return signed
    candidate = Candidate(data=data, origin=target, from_network=from_network)
    found = resolver.check(candidate, asked=_asked_by_url(target) if from_network else None, target=target)
    if seen.keep_bundles and found.kind == "pith_bundle":
        from records.canonical import loads

        seen.bundles.append(loads(data, max_bytes=resolver.client.max_bytes))
    return found


def _asked_by_url(url: str) -> Any:
    """The number that an address names, as the registry's and every mirror's do; None where it names none."""
    import re

    from records.number import parse_reference

    match = re.search(r"/pith/([A-Za-z2-7]{26})(?:[./?]|$)", url)
    return parse_reference(f"pith:{match[1]}") if match else None


def _bundle(source: Path | bytes, target: str, resolver: "Resolver", seen: "_Seen") -> "Verification":
    from records.errors import MalformedError
    from records.package import STATEMENT, read_bundle
    from records.report import Check, Verification

    try:
        if isinstance(source, Path) and source.is_dir() and not (source / STATEMENT).is_file():
            raise MalformedError(
                f"bundle: expected {STATEMENT} in the folder, found none; this is no replication bundle"
            )
        files = read_bundle(source)
    except MalformedError as error:
        check = Check(code="schema", status="fail", detail=str(error))
        return Verification(target=target, kind="replication_bundle", checks=(check,))
    from repro.workflow import verify_bundle

    found = verify_bundle(files, target=target, trusted=resolver.trusted)
    if found.exit_code == 0:
        seen.replications[target] = files
    return found


def _envelope(data: bytes, target: str, resolver: "Resolver", seen: "_Seen") -> "Verification | None":
    """The verification of a signed statement of ours that stands alone; None where it is none."""
    from records import audit
    from records.errors import MalformedError
    from records.statement import open_envelope

    try:
        envelope = open_envelope(data)
    except MalformedError:
        return None
    if b"urn:pith-repro:plan:" in envelope.payload:
        from repro.workflow import signed

        if signed.is_signed_plan(envelope):
            return signed.verify_signed(data, target=target, trusted=resolver.trusted)
    if not audit.is_audit(envelope):
        return None
    seen.audits.append(data)
    return audit.verify_audit(data, target=target, trusted=resolver.trusted)


def _timestamps(target: str, seen: "_Seen") -> "list[Check]":
    """The checks of the OpenTimestamps proof that lies beside a file, if one does."""
    if "://" in target or not Path(f"{target}.ots").is_file() or not Path(target).is_file():
        return []
    from records.errors import UsageError
    from records.timestamps import MAX_PROOF, check_proof

    try:
        with Path(f"{target}.ots").open("rb") as file:
            return check_proof(Path(target).read_bytes(), file.read(MAX_PROOF + 1), headers=seen.headers)
    except OSError as error:
        raise UsageError(f"cannot read {target}.ots: {error.strerror or error}") from None


def _merge_audits(seen: "_Seen", trusted: "KeySet", *, as_json: bool) -> list[int]:
    """What the audits among the targets say of the replications among them; an exit code a replication audited."""
    if not seen.audits or not seen.replications:
        return []
    from contextlib import nullcontext, redirect_stdout

    from records.audit import read_audit
    from records.canonical import sha256_hex
    from records.errors import ReproError
    from records.package import MANIFEST
    from repro.cli.evidence import merge, show_merged

    codes = []
    for target, files in seen.replications.items():
        linked = []
        for data in seen.audits:
            try:
                if read_audit(data).manifest_sha256 == sha256_hex(files[MANIFEST]):
                    linked.append(data)
            except ReproError:
                continue  # said already, where the statement itself was verified
        if linked:
            with redirect_stdout(sys.stderr) if as_json else nullcontext():
                print(f"audits of {plain(target)}")
                codes.append(show_merged(merge(files, linked, trusted)))
    return codes


def _compare(path: Path, bundles: list[Any], max_bytes: int) -> int:
    """Merge the bundles among the targets and compare with a served state; the exit code of the comparison."""
    from records.canonical import loads
    from records.errors import UsageError
    from records.merge import compare_with_served, merge_bundles

    if not bundles:
        raise UsageError("--state compares it with bundle.json targets, and there were none")
    try:
        served = loads(path.read_bytes(), max_bytes=max_bytes)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    faults = compare_with_served(merge_bundles(bundles), served)
    for fault in faults:
        print(f"repro: {path}: {fault}", file=sys.stderr)
    if not faults:
        print(f"repro: {path}: the merge of {len(bundles)} bundle(s) gives the same", file=sys.stderr)
    return 1 if faults else 0


def _show(found: "Verification", arguments: argparse.Namespace, code: int) -> None:
    if arguments.json:
        import json

        # ensure_ascii: nothing that a document holds can reach a terminal as a control character.
        print(json.dumps(found.to_json()), flush=True)
        return
    colour = sys.stdout.isatty()
    state = found.state
    meaning = _MEANING[state]
    if state == "valid" and code == 4:
        meaning += "; --require trusted asks for that"
    if code == 5:
        meaning = "the network did not answer"
    name = found.pith_number or plain(found.target)
    if found.pith_number is not None and found.pith_number != found.target:
        name += f" ({plain(found.target)})"
    print(f"{name}: {_painted(state, colour, state)}, {meaning}")
    skipped = 0
    for check in found.checks:
        if check.status == "skip" and not arguments.verbose and state != "indeterminate":
            skipped += 1
            continue
        print(f"  {_painted(check.status, colour, check.status)}  {check.code:<18} {plain(check.detail)}")
    if found.trust.key_id is not None:
        print(f"  key   {plain(found.trust.key_id)} ({found.trust.source})")
    if skipped:
        codes = dict.fromkeys(check.code for check in found.checks if check.status == "skip")
        print(f"  not proven: {', '.join(codes)} (-v says why)")


def _painted(key: str, colour: bool, text: str) -> str:
    return f"\x1b[{_COLOURS[key]}m{text}\x1b[0m" if colour else text


def plain(text: str) -> str:
    """`text` without anything that a terminal would obey: control and format characters become `?`."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)
