"""Runs Python that a model wrote, for pass@1, in a process of its own with limits. This is no sandbox.

The process has an empty environment and folder, a limit on time, memory and file size, and no standard input; it has the
user's rights to read files and to reach the network. Whoever asks for it (`--unsafe-code`) should be in a container.
"""

import contextlib
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_MEMORY = 2 * 2**30
_FILE = 2**20


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE, _FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def passes(code: str, *, seconds: float) -> bool:
    """Whether `code` runs to its last line without an error within so many seconds; leaving early is no pass."""
    end = secrets.token_hex(8)
    with tempfile.TemporaryDirectory(prefix="repro-code-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-"],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=_limit,
            start_new_session=True,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(f"{code}\nopen({end!r}, 'w').close()\n".encode(errors="replace"), timeout=seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and whatever it has started
        process.wait()
        return (Path(folder) / end).exists()
