"""What others read: the HTML report and the index of several replications, and a bundle in the forms of others."""

import argparse
import sys
from pathlib import Path
from typing import Any

Subparsers = Any  # argparse gives this type no public name

# Imports lie inside the commands: `repro verify` builds this parser too, and must start in milliseconds.


def add_parser(commands: Subparsers) -> None:
    """Adds the commands to `commands`."""
    command = commands.add_parser(
        "report", help="the HTML report of a run again; an index of bundles; the README's table"
    )
    command.add_argument(
        "dir", type=Path, metavar="DIR", nargs="?", help="a run directory; with --figures a bundle too"
    )
    command.add_argument(
        "--figures", type=Path, metavar="OUT", help="write each figure of DIR as SVG into the folder OUT instead"
    )
    command.add_argument(
        "--readme", type=Path, metavar="README", help="rewrite the table of published replications in this file"
    )
    command.add_argument(
        "--index", type=Path, nargs="+", metavar="PATH", help="a page over bundles: zips, or folders that hold some"
    )
    command.add_argument("-o", "--output", type=Path, metavar="FILE", help="where --index writes its page")
    command.add_argument(
        "--trusted-keys", type=Path, metavar="FILE", help="a JSON public key, or a list of them, to trust"
    )
    command.set_defaults(func=_report)

    command = commands.add_parser("export", help="a bundle as in-toto test-result or LaTeX; our JSON Schemas")
    command.add_argument("form", choices=("test-result", "latex", "schemas"))
    command.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="a replication bundle (zip or folder); for schemas, the folder to write them to",
    )
    command.add_argument("-o", "--output", type=Path, metavar="OUT", help="file to write (default: standard output)")
    command.add_argument("--key", type=Path, metavar="KEY", help="sign the test-result with this private key")
    command.add_argument(
        "--trusted-keys", type=Path, metavar="FILE", help="a JSON public key, or a list of them, to trust"
    )
    command.set_defaults(func=_export)


def _report(arguments: argparse.Namespace) -> int:
    from records.errors import UsageError
    from repro.workflow.publish import rewrite_readme, write_figures, write_index, write_report

    if [arguments.dir, arguments.readme, arguments.index].count(None) != 2:
        raise UsageError("report: expected either a run directory or --readme README or --index PATH…")
    if (arguments.index is None) != (arguments.output is None):
        raise UsageError("report: --index writes the page that -o names, and nothing else has an -o")
    if arguments.figures and arguments.dir is None:
        raise UsageError("report: --figures needs the run directory or the bundle whose figures they are")
    if arguments.figures:
        print(*write_figures(arguments.dir, arguments.figures), sep="\n")
    elif arguments.readme:
        rewrite_readme(arguments.readme)
    elif arguments.index:
        count = write_index(arguments.index, arguments.output, trusted_keys=arguments.trusted_keys)
        print(f"{arguments.output}: {count} replication{'' if count == 1 else 's'}")
    else:
        print(write_report(arguments.dir))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from records import keys
    from records.errors import UsageError
    from records.package import read_bundle, write_atomically
    from repro.workflow.bundle import sound
    from repro.workflow.export import as_latex, as_test_result

    if arguments.form == "schemas":
        return _schemas(arguments)
    if arguments.key and arguments.form != "test-result":
        raise UsageError("export latex: a table is not signed; leave --key out")
    key = keys.load(arguments.key) if arguments.key else None
    files = read_bundle(arguments.file)
    sound(files, target=str(arguments.file), trusted=keys.trusted_keys(arguments.trusted_keys))
    data = as_latex(files) if arguments.form == "latex" else as_test_result(files, key=key) + b"\n"
    if arguments.output:
        write_atomically(arguments.output, data)
        print(arguments.output)
    else:
        sys.stdout.buffer.write(data)
    return 0


def _schemas(arguments: argparse.Namespace) -> int:
    from records.errors import UsageError
    from records.package import write_atomically
    from repro.workflow.schemas import schemas

    if arguments.output or arguments.key:
        raise UsageError("export schemas: expected a folder, and neither -o nor --key")
    try:
        arguments.file.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {arguments.file}: {error.strerror or error}") from None
    files = schemas()
    for name, data in files.items():
        write_atomically(arguments.file / name, data)
    print(f"{arguments.file}: {len(files)} schemas")
    return 0
