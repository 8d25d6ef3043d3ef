"""`repro mirror build` and `repro submit`: what leaves this machine, and only when asked to."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from records.keys import KeySet, PrivateKey
    from records.mirror import Page


def add_parser(subparsers: Any) -> None:
    """Add both commands to `subparsers`."""
    command = subparsers.add_parser("mirror", help="a static mirror of records and replications")
    actions = command.add_subparsers(title="actions", metavar="ACTION", required=True)
    action = actions.add_parser("build", help="write the site to DIR, which must be empty or absent")
    action.add_argument("dir", type=Path, metavar="DIR")
    action.add_argument("--base-url", required=True, metavar="URL", help="where the site will be hosted, https://…")
    action.add_argument(
        "--key", type=Path, required=True, metavar="FILE", help="the mirror's private key, for its public half"
    )
    action.add_argument("--name", default="pith-repro mirror", help="the mirror's name")
    action.add_argument("--document", type=Path, action="append", default=[], metavar="FILE",
                        help="a record or bundle JSON; may be given again (default: the package's records)")  # fmt: skip
    action.add_argument("--replication", type=Path, action="append", default=[], metavar="FILE",
                        help="a replication bundle of one of the papers; may be given again")  # fmt: skip
    action.add_argument(
        "--trusted-keys", type=Path, metavar="FILE", help="a JSON public key, or a list of them, to trust"
    )
    action.set_defaults(func=_build)

    command = subparsers.add_parser("submit", help="show what would be submitted of a replication; --yes sends it")
    command.add_argument("file", type=Path, metavar="FILE", help="a replication bundle")
    command.add_argument("--to", metavar="URL", help="where to (default: the registry's address for the paper)")
    command.add_argument("--bundle-url", metavar="URL", help="where the bundle itself is published")
    command.add_argument("--yes", action="store_true", help="send it")
    command.add_argument(
        "--trusted-keys", type=Path, metavar="FILE", help="a JSON public key, or a list of them, to trust"
    )
    command.set_defaults(func=_submit)


def _now() -> str:
    """The time as UTC; SOURCE_DATE_EPOCH, where set, makes a build reproducible."""
    import datetime

    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    moment = (
        datetime.datetime.fromtimestamp(int(epoch), datetime.UTC)
        if epoch.isdigit()
        else datetime.datetime.now(datetime.UTC)
    )
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _build(arguments: argparse.Namespace) -> int:
    from records import keys
    from records.errors import UsageError
    from records.mirror import build_site
    from records.package import write_atomically

    folder: Path = arguments.dir
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not an empty folder; a mirror is built into a new one")
    key: PrivateKey = keys.load(arguments.key)
    own = keys.PublicKey(key_id=key.key_id, raw=key.public.raw, source="file")
    trusted = keys.trusted_keys(arguments.trusted_keys).with_keys([own])
    pages = _pages(arguments, trusted)
    site = build_site(
        pages, key=own, trusted=trusted, base_url=arguments.base_url, name=arguments.name, generated_at=_now()
    )
    # Everything was built and verified above, so that nothing is written of a site that would not be whole.
    for name, data in site.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write {path.parent}: {error.strerror or error}") from None
        write_atomically(path, data)
    print(f"{folder}: {len(site)} files, {len(pages)} numbers; host it at {arguments.base_url}")
    return 0


def _pages(arguments: argparse.Namespace, trusted: "KeySet") -> "list[Page]":
    from records import canonical
    from records.errors import UsageError
    from records.mirror import Page
    from records.package import read_bundle, zip_bytes
    from records.replication import read_statement, side_by_side
    from records.resolver import STORE
    from repro.workflow import verify_bundle

    documents = []
    for path in arguments.document or sorted((STORE / "records").glob("*.json")):
        try:
            documents.append(canonical.loads(path.read_bytes()))
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    replications: dict[str, dict[str, bytes]] = {}
    opened: dict[str, list[dict[str, bytes]]] = {}
    for path in arguments.replication:
        files = read_bundle(path)
        found = verify_bundle(files, target=str(path), trusted=trusted)
        if found.exit_code != 0:
            raise UsageError(f"{path} is {found.state}; a mirror spreads what holds: see repro verify {path}")
        subject = read_statement(files).statement["subject"][0]["name"]
        data = zip_bytes(files)
        replications.setdefault(subject, {})[f"{canonical.sha256_hex(data)[:16]}.repro.zip"] = data
        opened.setdefault(subject, []).append(files)
    pages = []
    for document in documents:
        number = _number_of(document)
        compared = side_by_side(opened.pop(number), trusted=trusted) if number in opened else None
        pages.append(Page(document=document, replications=replications.get(number, {}), compared=compared))
    if opened:
        raise UsageError(f"no document was given for the paper of a replication: {', '.join(sorted(opened))}")
    return pages


def _number_of(document: Any) -> str:
    from records import canonical
    from records.fields import get, text
    from records.number import number_of

    record = get(document, "canonical_record")
    submitted = text(record, "metadata", "submitted_at")
    return number_of(bytes.fromhex(canonical.digest(record)), submitted) if submitted is not None else ""


def _submit(arguments: argparse.Namespace) -> int:
    from records import keys, submit
    from records.errors import InvalidError
    from records.network import Client
    from records.package import read_bundle, zip_bytes
    from repro.cli.verify import plain
    from repro.workflow import verify_bundle

    files = read_bundle(arguments.file)
    found = verify_bundle(files, target=str(arguments.file), trusted=keys.trusted_keys(arguments.trusted_keys))
    if found.exit_code != 0:
        faults = "; ".join(check.detail for check in found.checks if check.status == "fail") or found.state
        raise InvalidError(f"{arguments.file} is {found.state} and was not submitted: {faults}")
    # The zip is packed again, so a folder and a zip of the same files are one submission.
    submission = submit.prepare(files, zip_bytes(files), to=arguments.to, bundle_url=arguments.bundle_url)
    folder = submit.receipts_folder()
    earlier = submit.stored_receipt(submission, folder)
    print("\n".join(plain(line) for line in submission.shown().splitlines()))
    print(f"\nrepro: {submit.NOTICE}", file=sys.stderr)
    if earlier is not None:
        print(
            f"repro: sent before, at {plain(str(earlier.get('sent_at')))}; the receipt is {folder}/{submission.digest}.json"
        )
        return 0
    if not arguments.yes:
        print("repro: nothing was sent; --yes sends exactly this", file=sys.stderr)
        return 0
    receipt = submit.send(submission, client=Client(max_bytes=1024 * 1024), folder=folder, sent_at=_now())
    print(f"repro: HTTP {receipt['status']}; the answer is kept in {folder}/{submission.digest}.json")
    return 0
