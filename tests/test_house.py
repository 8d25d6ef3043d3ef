"""The arrows that only a running process shows: what an import drags in."""

import subprocess
import sys

import pytest
from command_line import ROOT


def loaded(code: str) -> set[str]:
    """Top-level modules loaded after `code` ran in a fresh interpreter."""
    script = f"import sys, io; out = sys.stdout; sys.stdout = io.StringIO()\n{code}\nout.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


HELP = "from repro.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
RECORDS = (
    "import importlib, pkgutil, records\n"
    "for found in pkgutil.iter_modules(records.__path__):\n    importlib.import_module(f'records.{found.name}')"
)


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        (RECORDS, {"torch", "numpy", "scipy", "repro", "papers"}),
        (HELP, {"torch", "numpy", "scipy", "jsonschema", "requests", "rich", "matplotlib"}),
        ("from repro.cli import main; main(['verify', 'pith:IV7VH3NC', '--offline'])",
         {"torch", "numpy", "scipy", "jsonschema", "requests", "rich", "nacl"}),
        ("from repro.cli import main; main(['claims', 'emoe'])", {"torch", "matplotlib"}),
        ("import repro.workflow.bundle", {"torch", "matplotlib"}),
    ],
)  # fmt: skip
def test_what_an_import_does_not_drag_in(code, unwanted):
    assert not loaded(code) & unwanted
