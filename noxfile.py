"""Sessions: `nox` runs lint and tests; `nox -s reproduce-emoe` reproduces a paper. All share one environment.

Arguments after `--` pass through: `nox -s reproduce-emoe -- --scale smoke`, `nox -s tests -- -k judge`.
"""

import argparse
import hashlib
import os
import sys
from pathlib import Path

import nox

nox.options.sessions = ["lint", "tests"]
nox.options.default_venv_backend = "none"  # see _install

ROOT = Path(__file__).parent
SHARED = ROOT / ".nox" / "shared"
BIN = SHARED / ("Scripts" if os.name == "nt" else "bin")


def _install(session: nox.Session) -> None:
    """One environment for all sessions, at the pinned versions; nothing is done where it is up to date.

    nox makes an environment a session, and each would hold its own torch.
    """
    pins = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes() + sys.version.encode()
    stamp, wanted = SHARED / "installed", hashlib.sha256(pins).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        session.run(sys.executable, "-m", "venv", "--clear", str(SHARED))
        _run(session, "python", "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt",
             "--editable", ".[train,eval,report,timestamps,dev]")  # fmt: skip
        stamp.write_text(wanted)


def _run(session: nox.Session, command: str, *words: str, success_codes: tuple[int, ...] = (0,)) -> None:
    session.run(str(BIN / command), *words, external=True, success_codes=success_codes)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, types, and the arrows between the packages."""
    _install(session)
    _run(session, "ruff", "check", ".")
    _run(session, "ruff", "format", "--check", ".")
    _run(session, "mypy")
    _run(session, "lint-imports")


@nox.session
def tests(session: nox.Session) -> None:
    """The whole test suite, without what needs a GPU or an hour."""
    _install(session)
    if sys.platform == "linux" and not any(SHARED.glob("lib/*/site-packages/triton")):
        # torch's builds for the CPU leave Triton out; its interpreter runs our kernels there. No extra and no pin holds it, for
        # torch's builds for CUDA each ask for a version of their own.
        _run(session, "python", "-m", "pip", "install", "--quiet", "triton~=3.8.0")
    _run(session, "pytest", *session.posargs)


@nox.session(default=False)
def conformance(session: nox.Session) -> None:
    """Third-party vectors and every published record at hand."""
    _install(session)
    _run(session, "pytest", "tests/conformance", *session.posargs)


@nox.session(default=False)
def fuzz(session: nox.Session) -> None:
    """An hour of fuzzing over every parser of foreign bytes; `-- --seconds 60 --targets zip` for less."""
    _install(session)
    _run(session, "python", "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt", "atheris")
    _run(session, "python", "tests/fuzz/fuzz.py", *session.posargs)


@nox.session(default=False)
def formats(session: nox.Session) -> None:
    """Every published bundle as an RO-Crate, and CITATION.cff, by the validators of others, in an environment of their own."""
    own = ROOT / ".nox" / "formats"
    python = str(own / BIN.name / "python")
    session.run(sys.executable, "-m", "venv", "--clear", str(own))
    session.run(python, "-m", "pip", "install", "--quiet", "--editable", ".", "pyyaml", "roc-validator==0.13.0",
                "rocrate==0.13.0", external=True)  # fmt: skip
    session.run(python, "-m", "pip", "install", "--quiet", "--no-deps", "cffconvert==2.0.0", external=True)
    bundles = sorted(map(str, ROOT.glob("papers/*/replications/*.repro.zip")))
    session.run(python, "tests/formats/crates.py", *(session.posargs or bundles), external=True)
    session.run(python, "tests/formats/citation.py", external=True)


@nox.session(default=False)
def soak(session: nox.Session) -> None:
    """Runs killed at 200 random moments and resumed: the same weights, traces and verdict inputs; `-- --kills 20` for less."""
    _install(session)
    _run(session, "python", "tests/soak/soak.py", *session.posargs)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Speed ratios, measured side by side."""
    _install(session)
    for what in session.posargs or ("verify", "moe", "train"):
        _run(session, "repro", "bench", what)


def _reproduce(session: nox.Session, paper: str) -> None:
    """Run, bundle with the user's key (made on first use), verify. Options pass through to `repro run`."""
    _install(session)
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--scale", default="nano")
    parser.add_argument("--out", type=Path)
    known, _ = parser.parse_known_args(session.posargs)
    out = known.out or ROOT / "runs" / f"{paper}-{known.scale}"
    key, bundle = ROOT / "runs" / "replicator.key", out.with_name(f"{out.name}.repro.zip")
    key.parent.mkdir(exist_ok=True)
    if not key.exists():
        _run(session, "repro", "keys", "new", str(key))
    # not replicated (1) and inconclusive (4) are results, not failures of the session
    _run(session, "repro", "run", paper, "--out", str(out), *session.posargs, success_codes=(0, 1, 4))
    _run(session, "repro", "bundle", str(out), "-o", str(bundle), "--key", str(key))
    _run(session, "repro", "verify", str(bundle), "--offline", "--trusted-keys", f"{key}.pub.json")


@nox.session(name="reproduce-emoe", default=False)
def reproduce_emoe(session: nox.Session) -> None:
    """Elastic MoE (arXiv 2509.21892)."""
    _reproduce(session, "emoe")


@nox.session(name="reproduce-emo", default=False)
def reproduce_emo(session: nox.Session) -> None:
    """EMO (arXiv 2605.13247)."""
    _reproduce(session, "emo")


@nox.session(name="reproduce-expert-upcycling", default=False)
def reproduce_expert_upcycling(session: nox.Session) -> None:
    """Expert Upcycling (arXiv 2604.19835)."""
    _reproduce(session, "expert-upcycling")


@nox.session(name="reproduce-equal-resource", default=False)
def reproduce_equal_resource(session: nox.Session) -> None:
    """Mixture-of-Experts under strictly equal resource (arXiv 2506.12119)."""
    _reproduce(session, "equal-resource")


@nox.session(name="reproduce-mssp", default=False)
def reproduce_mssp(session: nox.Session) -> None:
    """MSSP (arXiv 2605.14200)."""
    _reproduce(session, "mssp")


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """What needs a GPU: tests, tiles, benchmarks beside peers; `-- --out DIR --steps tests,tune,moe,train --budget MINUTES`."""
    _install(session)
    _run(
        session, "python", "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt", "--editable", ".[gpu]"
    )
    _run(session, "repro", "bench", "gpu", *session.posargs)
