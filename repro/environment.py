"""What decides whether an execution can be bitwise the same elsewhere: versions, device, threads, deterministic flags."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import repro
from records.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class NumericEnvironment:
    """Two executions of a segment in equal environments give bitwise equal weights.

    `capability` is the instruction set that torch dispatches to on a CPU (AVX2, AVX512, …), the compute capability on a
    GPU; `blas` tells the linear algebra library. `layout` tells how a model lies on the processes of a torchrun
    (`repro.cluster`); `compiled` names what compiled this package's own steps on a CPU (`repro.moe.cpu_rows_compiled`). The
    corpus' digest is in the plan beside this.
    """

    torch: str
    device: str
    capability: str
    machine: str
    threads: int
    deterministic: bool
    blas: str
    layout: str = "one process"
    compiled: str = "nothing"


def require_torch() -> None:
    """Raises UsageError, naming the extra that mends it, where torch is not installed."""
    try:
        import safetensors
        import torch  # noqa: F401

        del safetensors
    except ImportError as error:
        raise UsageError(f"training needs the package {error.name!r}: pip install 'pith-repro[train]'") from error


def set_deterministic() -> None:
    """One thread, deterministic algorithms, no TF32: what every arm runs under.

    Must come before the first operation of the process.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # Filling every new tensor guards against reading what was never written; it costs a fifth of a nano step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_flush_denormal(True)  # a softmax that is sure of itself underflows, and denormals cost 20 times as much
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")


def numeric_environment(device: str, layout: str = "one process") -> NumericEnvironment:
    """Environment in which arms run on `device` (cpu or cuda), each model on one process or as `layout` says.

    Raises:
        UsageError: torch is missing, or `device` is not there.
    """
    require_torch()
    import torch

    from repro.moe import cpu

    compiled = "nothing"
    if device == "cuda":
        if not torch.cuda.device_count():
            raise UsageError("device cuda: torch finds no GPU here; run with --device cpu")
        name = torch.cuda.get_device_name()
        major, minor = torch.cuda.get_device_capability()
        capability, blas = f"sm_{major}{minor}", f"cuda {torch.version.cuda}"
    elif device == "cpu":
        name, capability = "cpu", torch.backends.cpu.get_cpu_capability()
        blas = "mkl" if torch._C.has_mkl else "other"
        if cpu.compiled():
            compiled = f"numba {importlib.metadata.version('numba')}"
    else:
        raise UsageError(f"unknown device {device!r}: expected cpu or cuda")
    return NumericEnvironment(
        torch=torch.__version__,
        device=name,
        capability=capability,
        machine=f"{platform.system()} {platform.machine()}",
        threads=1,
        deterministic=True,
        blas=blas,
        layout=layout,
        compiled=compiled,
    )


def code_state() -> dict[str, Any]:
    """Identity of the running code: SHA-256 over its files, version, and git commit and dirty flag where there is a checkout."""
    root = Path(repro.__file__).parents[1]
    lines = []
    for package in ("papers", "records", "repro"):
        for path in sorted((root / package).rglob("*")):
            if path.suffix in {".py", ".toml", ".json", ".html"} and "replications" not in path.parts:
                lines.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(root).as_posix()}\n")
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    return {
        "sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
        "version": repro.__version__,
        "commit": commit,
        # where no commit vouches for the files, they count as changed
        "dirty": commit is None or _git(root, "status", "--porcelain") != "",
    }


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
