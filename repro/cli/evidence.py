"""Commands of the auditor: audit (parts of a bundle executed again, or audits merged), prove, timestamp."""

import argparse
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repro.cli.run import duration, positive

if TYPE_CHECKING:
    from records.audit import MergedAudits
    from records.keys import KeySet

Subparsers = Any  # argparse gives this type no public name

# Imports lie inside the commands: `repro verify` builds this parser too, and must start in milliseconds.


def add_parser(commands: Subparsers) -> None:
    """Adds the commands to `commands`."""
    command = commands.add_parser(
        "audit", help="verify a bundle, then execute parts of it again, drawn by you; or merge the audits of it"
    )
    command.add_argument("file", type=Path, metavar="FILE", help="a replication bundle (zip or folder)")
    command.add_argument(
        "--arms", type=_count, metavar="N", help="arms and seeds to draw (default: 1, or 0 with --segments)"
    )
    command.add_argument(
        "--segments", type=_count, default=0, metavar="N", help="stretches between committed weight hashes to draw"
    )
    command.add_argument(
        "--seed", type=_count, metavar="S", help="of the draw (default: from the system's random numbers)"
    )
    command.add_argument("--workers", type=positive, default=os.cpu_count() or 1, metavar="N")
    command.add_argument("--checkpoint", type=Path, metavar="DIR", help="folder of the checkpoint that the plan names")
    command.add_argument("--key", type=Path, metavar="FILE", help="sign an audit statement with this private key")
    command.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="the statement (default with --key: beside the bundle)"
    )
    command.add_argument(
        "--merge",
        nargs="+",
        type=Path,
        metavar="AUDIT",
        help="execute nothing: what these audit statements say together",
    )
    command.add_argument("--trusted-keys", type=Path, metavar="FILE", help="auditors' public keys, for --merge")
    command.add_argument("--json", action="store_true", help="one JSON object")
    command.set_defaults(func=_audit)

    command = commands.add_parser("timestamp", help="put an OpenTimestamps proof beside a plan or a bundle")
    command.add_argument("file", type=Path, metavar="FILE", help="what was stamped: a signed plan, a bundle")
    command.add_argument(
        "proof", type=Path, metavar="PROOF", help="the proof, which is joined with FILE.ots if that is there"
    )
    command.set_defaults(func=_timestamp)

    command = commands.add_parser("prove", help="one piece of a bundle's evidence, checkable without the rest")
    command.add_argument("file", type=Path, metavar="FILE", help="a replication bundle (zip or folder)")
    command.add_argument("--arm", required=True, metavar="ID")
    command.add_argument("--seed", type=int, required=True, metavar="N")
    command.add_argument(
        "--step", type=int, metavar="S", help="the piece of the trace that this step lies in (default: the measures)"
    )
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    command.set_defaults(func=_prove)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**53:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, found {text!r}")
    return int(text)


def _audit(arguments: argparse.Namespace) -> int:
    from records import keys
    from records.audit import sign_audit
    from records.canonical import sha256_hex
    from records.errors import UsageError
    from records.keys import trusted_keys
    from records.package import MANIFEST, read_bundle, require_writable, write_atomically
    from records.replication import PLAN
    from repro.cli.progress import reporter
    from repro.workflow import audit
    from repro.workflow.bundle import sound
    from repro.workflow.plan import parse_plan
    from repro.workflow.run import execute_jobs, now

    files = read_bundle(arguments.file)
    sound(files, target=str(arguments.file), trusted=keys.pinned())
    if arguments.merge:
        statements = [_read(path) for path in arguments.merge]
        return show_merged(merge(files, statements, trusted_keys(arguments.trusted_keys)), as_json=arguments.json)
    asked = (arguments.arms if arguments.arms is not None else int(not arguments.segments), arguments.segments)
    if not any(asked):
        raise UsageError("audit: expected at least one of --arms and --segments above 0")
    key = keys.load(arguments.key) if arguments.key else None
    plan = parse_plan(files[PLAN], name=PLAN)
    seed = secrets.randbits(32) if arguments.seed is None else arguments.seed
    output = arguments.output or (_beside(arguments.file, key.key_id, seed) if key else None)
    if output:
        require_writable(output)  # not found out after the training
    drawn = audit.draw(plan, arms=asked[0], segments=asked[1], seed=seed)
    differing = audit.mismatches(plan, drawn, arguments.checkpoint)
    cost, share = audit.cost(plan, drawn, workers=arguments.workers)
    print(f"verified; draw {seed}: {drawn}; about {duration(cost.seconds)}, {share:.1%} of the run", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="repro-audit-") as name:
        folder = Path(name)
        with reporter() as progress:
            execute_jobs(
                plan,
                folder,
                drawn.arms,
                drawn=drawn.stretches,
                workers=arguments.workers,
                reporter=progress,
                checkpoint=arguments.checkpoint,
            )
        audited = audit.compare(plan, drawn, files, folder, exact=not differing)
        said = audit.predicate(
            plan, drawn, audited, files=files, folder=folder, asked=asked, differing=differing, finished_at=now()
        )
    statement = sign_audit(said, manifest_sha256=sha256_hex(files[MANIFEST]), key=key)
    if output:
        write_atomically(output, statement)
    if arguments.json:
        print(json.dumps(said))
        return audit.exit_code(audited)
    if differing:
        print(f"not the plan's here: {', '.join(differing)}; losses may differ by {plan['tolerance']['loss']} nats")
    else:
        print("environment, code and corpora are the plan's: every line has to be the same bytes")
    for item in audited:
        numbers = f"{item.lines} lines, largest difference {item.difference:.3g}"
        left = f"; not compared: {', '.join(item.not_compared)}" if item.not_compared else ""
        print(f"{item.agreement.replace('_', ' '):17} {item} ({numbers}{left})")
    taken, whole = float(said["cost"]["seconds"]), float(said["cost"]["run_seconds"])
    print(f"trained for {duration(taken)} where the run trained for {duration(whole)}: {taken / max(whole, 1e-9):.1%}")
    if output:
        print(f"{output}: audit statement, {f'signed with {key.key_id}' if key else 'not signed (no --key)'}")
    return audit.exit_code(audited)


def _beside(bundle: Path, key_id: str, seed: int) -> Path:
    from repro.workflow.publish import stem

    return bundle.with_name(f"{stem(bundle)}.{key_id}-{seed}.audit.json")


def _read(path: Path) -> bytes:
    from records.canonical import MAX_BYTES
    from records.errors import UsageError

    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None


def merge(files: Mapping[str, bytes], statements: Iterable[bytes], trusted: "KeySet") -> "MergedAudits":
    """What the audit statements say together of a bundle that holds; one whose items its seed does not draw is refused."""
    from records.audit import merge_audits, read_audit
    from records.canonical import sha256_hex
    from records.errors import InvalidError
    from records.package import MANIFEST
    from records.replication import PLAN
    from repro.workflow.audit import check_draw
    from repro.workflow.plan import parse_plan

    plan = parse_plan(files[PLAN], name=PLAN)

    def examine(data: bytes) -> None:
        faults = [check.detail for check in check_draw(plan, files, read_audit(data)) if check.status == "fail"]
        if faults:
            raise InvalidError("; ".join(faults))

    return merge_audits(statements, manifest_sha256=sha256_hex(files[MANIFEST]), trusted=trusted, examine=examine)


def show_merged(merged: "MergedAudits", *, as_json: bool = False) -> int:
    """Prints what audits say together, for people or as JSON; returns the exit code."""
    if as_json:
        print(json.dumps(merged.to_json()))
        return merged.exit_code
    names = {
        mark: key_id + ("" if trusted else " (not trusted)") for mark, (key_id, trusted) in merged.auditors.items()
    }
    for item in merged.items:
        arm, seed, segment, first, last = item.place
        what = f"{arm} seed {seed}" + (f" part {segment} steps {first + 1} to {last}" if segment else "")
        word = "in contradiction" if item.contradiction else "agrees" if item.agree else "differs"
        said = [f"{word}: {', '.join(names[mark] for mark in marks)}"
                for word, marks in (("agrees", item.agree), ("differs", item.differ)) if marks]  # fmt: skip
        print(f"{word:17} {what} ({'; '.join(said)})")
    for reason in merged.refused:
        print(f"refused           {reason}")
    print(f"{len(merged.items)} parts by {len(merged.auditors)} auditors")
    return merged.exit_code


def _prove(arguments: argparse.Namespace) -> int:
    from records.keys import pinned
    from records.package import read_bundle, write_atomically
    from repro.workflow import prove
    from repro.workflow.bundle import sound

    files = read_bundle(arguments.file)
    sound(files, target=str(arguments.file), trusted=pinned())
    data = prove.prove(files, arm=arguments.arm, seed=arguments.seed, step=arguments.step)
    write_atomically(arguments.output, data)
    found = prove.verify(data, trusted=pinned())
    whose = [check.detail for check in found.checks if check.code == "trace"][-1]
    whole = sum(len(data) for data in files.values())
    print(f"{arguments.output}: {whose}; {len(data):,} bytes where the bundle has {whole:,}")
    return 0


def _timestamp(arguments: argparse.Namespace) -> int:
    from records.timestamps import attach, check_proof

    path = attach(arguments.file, _read(arguments.proof))
    for check in check_proof(arguments.file.read_bytes(), path.read_bytes()):
        print(f"{path}: {check.detail}")
    return 0
