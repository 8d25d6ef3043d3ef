"""What a run and published replications show people: report.html, single figures, an index of several, the README's table."""

import csv
import glob
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from records import canonical, keys
from records.errors import InvalidError, UsageError
from records.package import STATEMENT, read_bundle, write_atomically
from records.replication import read_statement, side_by_side
from repro.config import decode
from repro.experiment import Figure
from repro.judge import Evidence
from repro.report import require_report
from repro.report.table import Published, markdown, replace_table
from repro.workflow.bundle import sound
from repro.workflow.evidence import load, read_directory
from repro.workflow.plan import parse_plan
from repro.workflow.run import read_plan


def write_report(folder: Path) -> Path:
    """Writes report.html of the judged run in `folder` and returns its path.

    Raises:
        UsageError: a missing extra, or no judged run in `folder`.
        InvalidError: the evidence does not hold.
    """
    require_report()
    from repro.report.figures import Courses
    from repro.report.page import render

    plan = read_plan(folder)
    try:
        outcome = canonical.loads((folder / "outcome.json").read_bytes())
        run = canonical.loads((folder / "run.json").read_bytes())
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot read {error.filename}: {error.strerror}; make it with repro judge"
        ) from error
    files = read_directory(folder)
    loaded = load(plan, files)
    if loaded.faults:
        raise InvalidError(f"{folder}: {loaded.faults[0]}")
    path = folder / "report.html"
    courses = Courses(losses=loaded.losses, timed=loaded.timed, probes=loaded.probes)
    write_atomically(path, render(plan, outcome, run, loaded.evidence, courses, files).encode())
    return path


def write_figures(source: Path, out: Path) -> list[Path]:
    """Writes each figure of a judged run or a replication bundle as figure-N.svg into `out`, and returns the paths.

    A figure of `cells` also gets its differences as figure-N.csv: curve, row, seed, value.

    Raises:
        UsageError: a missing extra, nothing judged at `source`, or `out` cannot be written.
        InvalidError: the evidence does not hold.
    """
    require_report()
    from repro.report.figures import Courses, draw

    if source.is_file():
        files: Mapping[str, bytes] = read_bundle(source)
    else:
        names = [source / "plan.json", source / "outcome.json"]
        if lacking := [path for path in names if not path.is_file()]:
            raise UsageError(f"{source}: expected a judged run or a replication bundle, found no {lacking[0].name}")
        files = read_directory(source) | {path.name: path.read_bytes() for path in names}
    plan = parse_plan(files["plan.json"], name=f"{source}: plan.json")
    loaded = load(plan, files)
    if loaded.faults:
        raise InvalidError(f"{source}: {loaded.faults[0]}")
    chosen = canonical.loads(files["outcome.json"])["groups"]
    labels = {item["id"]: item["label"] for item in (*plan["arms"], *plan["groups"])}
    courses = Courses(losses=loaded.losses, timed=loaded.timed, probes=loaded.probes)
    written = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(plan["figures"], start=1):
            figure = decode(Figure, data)
            texts = {"svg": draw(figure, loaded.evidence, courses, seeds=plan["seeds"], chosen=chosen, labels=labels)}
            if figure.kind == "cells":
                texts["csv"] = _csv(figure, loaded.evidence, plan["seeds"], chosen)
            for kind, text in texts.items():
                written.append(out / f"figure-{number}.{kind}")
                write_atomically(written[-1], text.encode())
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror}; choose another folder") from error
    return written


def _csv(figure: Figure, evidence: Evidence, seeds: Sequence[int], chosen: Mapping[str, str]) -> str:
    from repro.report.figures import differences

    def rows() -> Iterator[tuple[str, str, int, str]]:
        for seed in seeds:
            for curve, cells in differences(figure, evidence, seeds=[seed], chosen=chosen).items():
                for name, values in zip(figure.names, cells, strict=True):
                    yield from ((curve, name, seed, f"{value:.6f}") for value in values)

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("curve", "row", "seed", "value"))
    writer.writerows(sorted(rows()))
    return text.getvalue()


def readme_table(root: Path) -> str:
    """The table of every bundle in papers/*/replications under `root`, each verified before it is believed.

    Raises:
        InvalidError: a bundle does not verify.
    """
    published = []
    for path in sorted(root.glob("papers/*/replications/*.repro.zip")):
        files = read_bundle(path)
        name = PurePosixPath(path.relative_to(root).as_posix())
        sound(files, target=str(name), trusted=keys.trusted_keys())
        plan = parse_plan(files["plan.json"], name=str(name))
        outcome = canonical.loads(files["outcome.json"])
        audits = tuple(name.with_name(audit.name) for audit in audits_of(path))
        published.append(Published(path=name, plan=plan, outcome=outcome, audits=audits))
    return markdown(published)


def audits_of(bundle: Path) -> list[Path]:
    """The audit statements that `repro audit` left beside a bundle."""
    return sorted(bundle.parent.glob(f"{glob.escape(stem(bundle))}.*.audit.json"))


def stem(bundle: Path) -> str:
    """The beginning of what is named after a bundle: its file's name without `.repro.zip`."""
    return bundle.resolve().name.removesuffix(".zip").removesuffix(".repro")


def rewrite_readme(path: Path) -> None:
    """Puts the table of the published replications beside the README at `path` into it."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    write_atomically(path, replace_table(text, readme_table(path.resolve().parent)).encode())


def write_index(paths: Sequence[Path], output: Path, *, trusted_keys: Path | None) -> int:
    """Writes the page over the bundles that `paths` name to `output`; returns how many they are.

    Args:
        paths: bundles (zip or folder), and folders in which every `*.repro.zip` counts, however deep.
        output: the page; it links to the bundles by their paths from there.
        trusted_keys: file of public keys to trust.

    Raises:
        UsageError: a missing extra, or a path with no bundle.
        InvalidError, MalformedError: a bundle does not hold; nothing is written.
    """
    require_report()
    from repro.report.index import Replication, render_index

    trusted = keys.trusted_keys(trusted_keys)
    found: dict[str, Replication] = {}
    opened: dict[str, list[Mapping[str, bytes]]] = {}
    for path in _bundles(paths):
        files = read_bundle(path)
        holds = sound(files, target=str(path), trusted=trusted)
        statement = read_statement(files).statement
        subject, predicate = statement["subject"][0]["name"], statement["predicate"]
        if predicate["manifest_sha256"] in found:
            continue  # the same bundle by another path
        opened.setdefault(subject, []).append(files)
        found[predicate["manifest_sha256"]] = Replication(
            subject=subject,
            name=path.name,
            href=quote(os.path.relpath(path.resolve(), output.resolve().parent).replace(os.sep, "/")),
            plan=parse_plan(files["plan.json"], name=f"{path}: plan.json"),
            outcome=canonical.loads(files["outcome.json"]),
            predicate=predicate,
            state=holds.state,
            signer=holds.trust.key_id,
        )
    compared = [side_by_side(bundles, trusted=trusted) for bundles in opened.values()]
    write_atomically(output, render_index(list(found.values()), compared).encode())
    return len(found)


def _bundles(paths: Sequence[Path]) -> list[Path]:
    """The bundles that the paths name, each path's in the order of their names."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path}: expected a bundle or a folder that holds some, found nothing")
        whole = path.is_file() or (path / STATEMENT).is_file()
        inside = [path] if whole else sorted(path.rglob("*.repro.zip"))
        if not inside:
            raise UsageError(f"{path}: expected a bundle or a folder that holds some (*.repro.zip), found none")
        found += inside
    return found
