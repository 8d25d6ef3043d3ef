"""The command line as a user types it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def repro(*words: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None, stdin: bytes | None = None):
    """Runs the command line as a user does; returns the completed process with bytes."""
    return subprocess.run(
        [sys.executable, "-m", "repro", *map(str, words)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | (env or {}),
        input=stdin,
        capture_output=True,
        timeout=240,
    )
