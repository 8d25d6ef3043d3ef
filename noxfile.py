"""Sessions: `nox` runs lint and tests; `nox -s reproduce-emoe` reproduces a paper. All share one environment.

Arguments after `--` pass through: `nox -s reproduce-emoe -- --scale smoke`, `nox -s tests -- -k judge`.
"""

import hashlib
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["lint", "tests"]
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"

ROOT = Path(__file__).parent
SHARED = ROOT / ".nox" / "shared"  # with torch: one for all sessions, installed once


def _install(session: nox.Session) -> None:
    """Everything at the pinned versions; nothing is done where the pins and pyproject.toml are those installed."""
    pins = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    stamp = Path(session.virtualenv.location) / "installed"
    wanted = hashlib.sha256(pins).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        session.install("--constraint", "constraints.txt", "--editable", ".[train,report,dev]")
        stamp.write_text(wanted)


@nox.session(venv_location=str(SHARED))
def lint(session: nox.Session) -> None:
    """Style, types, and the arrows between the packages."""
    _install(session)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports")


@nox.session(venv_location=str(SHARED))
def tests(session: nox.Session) -> None:
    """The whole test suite, without what needs a GPU or an hour."""
    _install(session)
    session.run("pytest", *session.posargs)


@nox.session(default=False, venv_location=str(SHARED))
def conformance(session: nox.Session) -> None:
    """Third-party vectors and every published record at hand."""
    _install(session)
    session.run("pytest", "tests/conformance", *session.posargs)


@nox.session(default=False, venv_location=str(SHARED))
def bench(session: nox.Session) -> None:
    """Speed ratios, measured side by side."""
    _install(session)
    for what in session.posargs or ("verify", "moe"):
        session.run("repro", "bench", what)


def _reproduce(session: nox.Session, paper: str) -> None:
    """Run, bundle with the user's key (made on first use), verify. Options pass through to `repro run`."""
    _install(session)
    options = list(session.posargs)
    scale = options[options.index("--scale") + 1] if "--scale" in options[:-1] else "nano"
    out = ROOT / "runs" / f"{paper}-{scale}"
    if "--out" in options[:-1]:
        out = Path(options[options.index("--out") + 1])
    key, bundle = ROOT / "runs" / "replicator.key", out.with_name(f"{out.name}.repro.zip")
    key.parent.mkdir(exist_ok=True)
    if not key.exists():
        session.run("repro", "keys", "new", str(key))
    # not replicated (1) and inconclusive (4) are results, not failures of the session
    session.run("repro", "run", paper, "--out", str(out), *options, success_codes=[0, 1, 4])
    session.run("repro", "bundle", str(out), "-o", str(bundle), "--key", str(key))
    session.run("repro", "verify", str(bundle), "--offline", "--trusted-keys", f"{key}.pub.json")


@nox.session(name="reproduce-emoe", default=False, venv_location=str(SHARED))
def reproduce_emoe(session: nox.Session) -> None:
    """Elastic MoE (arXiv 2509.21892)."""
    _reproduce(session, "emoe")
