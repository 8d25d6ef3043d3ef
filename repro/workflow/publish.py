"""What a run and the published replications show people: report.html, and the README's table."""

from pathlib import Path, PurePosixPath

from records import canonical
from records.errors import InvalidError, UsageError
from records.keys import trusted_keys
from records.package import read_bundle, write_atomically
from repro.report import require_report
from repro.report.table import markdown, replace_table
from repro.workflow.bundle import verify
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


def readme_table(root: Path) -> str:
    """The table of every bundle in papers/*/replications under `root`, each verified before it is believed.

    Raises:
        InvalidError: a bundle does not verify.
    """
    published = []
    for path in sorted(root.glob("papers/*/replications/*.repro.zip")):
        files = read_bundle(path)
        name = PurePosixPath(path.relative_to(root).as_posix())
        found = verify(files, target=str(name), trusted=trusted_keys())
        if found.exit_code:
            faults = "; ".join(check.detail for check in found.checks if check.status == "fail")
            raise InvalidError(f"{name}: {found.state}: {faults}")
        plan = parse_plan(files["plan.json"], name=str(name))
        published.append((name, plan, canonical.loads(files["outcome.json"])))
    return markdown(published)


def rewrite_readme(path: Path) -> None:
    """Puts the table of the published replications beside the README at `path` into it."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    write_atomically(path, replace_table(text, readme_table(path.resolve().parent)).encode())
