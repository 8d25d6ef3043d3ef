"""`repro keys`: signing keys are made, shown and listed; the private half is never printed."""

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the command to `subparsers`."""
    command = subparsers.add_parser("keys", help="make, show and list signing keys")
    actions = command.add_subparsers(title="actions", metavar="ACTION", required=True)

    action = actions.add_parser(
        "new", help="write a new private key to PATH (0600) and its public half to PATH.pub.json"
    )
    action.add_argument("path", type=Path, metavar="PATH")
    action.add_argument("--id", metavar="NAME", help="the key's id (default: repro- and the start of its fingerprint)")
    action.set_defaults(func=_new)

    action = actions.add_parser("show", help="the public half of a key file, private or public, as JSON")
    action.add_argument("path", type=Path, metavar="PATH")
    action.set_defaults(func=_show)

    action = actions.add_parser("list", help="the keys that give trust: pinned, and those of --trusted-keys")
    action.add_argument("--trusted-keys", type=Path, metavar="FILE", help="a JSON public key, or a list of them")
    action.add_argument("--json", action="store_true", help="one JSON object a key")
    action.set_defaults(func=_list)


def _new(arguments: argparse.Namespace) -> int:
    from records import keys

    key = keys.generate(key_id=arguments.id)
    keys.save(key, arguments.path)
    print(f"{key.key_id}: private key {arguments.path}, public key {keys.public_path(arguments.path)}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from records import canonical, keys
    from records.errors import MalformedError, UsageError

    try:
        value = canonical.loads(arguments.path.read_bytes())
        if isinstance(value, dict) and value.get("schema") == keys.PRIVATE_SCHEMA:
            found = [keys.load(arguments.path).public]
        else:
            found = keys.parse_public_keys(canonical.dumps(value), source="file")
    except OSError as error:
        raise UsageError(f"cannot read {arguments.path}: {error.strerror or error}") from None
    except MalformedError as error:
        named = str(error).startswith(f"{arguments.path}: ")
        raise MalformedError(str(error) if named else f"{arguments.path}: {error}") from None
    for key in found:
        print(json.dumps(key.to_json()))
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from records import keys

    for key in keys.trusted_keys(arguments.trusted_keys).keys:
        if arguments.json:
            print(json.dumps({**key.to_json(), "source": key.source}))
            continue
        since = f", pinned on {keys.pinned_at()}" if key.source == "pinned" else ""
        times = "".join(
            f", {name.replace('_', ' ')} {time}"
            for name, time in (
                ("valid_from", key.valid_from),
                ("valid_until", key.valid_until),
                ("revoked_at", key.revoked_at),
            )
            if time is not None
        )
        print(f"{key.key_id}  {keys.fingerprint(key.raw)}  {key.source}{since}{times}")
    return 0
