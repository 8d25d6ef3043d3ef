"""What is bitwise equal when something around a run changes, and how far apart losses come where it is not.

One small MoE is trained for the same steps again and again, each time in a process of its own in which one thing differs from
the base case; traces and final weights are compared. The seed row says what another seed does, for scale. With other
interpreters given, the verdicts of a published bundle are judged by each, and compared as bytes.

- `CASES`: what is changed
- `measure`: every case against the base
- `one`: a case, in its process: `python -m repro.bench.determinism '{"threads": 2}'`
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STEPS = 150

#: (what changes, its value, settings of the case, environment of its process). The base has one thread and backend cpu.
CASES: Sequence[tuple[str, str, Mapping[str, Any], Mapping[str, str]]] = (
    ("nothing", "the same again", {}, {}),
    ("processes", "beside another that trains, too", {"beside": True}, {}),
    ("stopped", "killed after half of the steps, and resumed", {"stop": True}, {}),
    ("threads", "2", {"threads": 2}, {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}),
    ("backend", "auto", {"backend": "auto"}, {}),
    ("backend", "reference", {"backend": "reference"}, {}),
    ("backend", "grouped", {"backend": "grouped"}, {}),
    ("capability", "avx2", {}, {"ATEN_CPU_CAPABILITY": "avx2"}),
    ("capability", "default", {}, {"ATEN_CPU_CAPABILITY": "default"}),
    ("MKL", "the same code on every Intel CPU (MKL_CBWR)", {}, {"MKL_CBWR": "COMPATIBLE"}),
    ("MKL and oneDNN", "limited to AVX2", {}, {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    ("capability, MKL and oneDNN", "AVX2 all", {},
     {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    ("denormals", "kept", {"denormals": True}, {}),
    ("deterministic flag", "off", {"deterministic": False}, {}),
    ("hash seed", "PYTHONHASHSEED=1", {}, {"PYTHONHASHSEED": "1"}),
    ("seed", "1 instead of 0", {"seed": 1}, {}),
)  # fmt: skip


def one(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Trains one case; returns the final weights' digest and the traced losses (nats/token), as texts."""
    from repro.environment import numeric_environment, set_deterministic

    set_deterministic()
    import torch

    from repro.data import corpus
    from repro.data.batches import Batches
    from repro.model import ModelConfig
    from repro.train import Mechanism, Segment, TrainConfig, train_segment

    if threads := settings.get("threads"):
        torch.set_num_threads(threads)
    if settings.get("denormals"):
        torch.set_flush_denormal(False)
    if settings.get("deterministic") is False:
        torch.use_deterministic_algorithms(False)
    steps, seed = settings.get("steps", STEPS), settings.get("seed", 0)
    every = max(10, steps // 20 * 10)
    segment = Segment(
        model=ModelConfig(
            d_model=64, num_layers=2, num_heads=4, d_expert=32, num_experts=16, top_k=2, context=128,
            backend=settings.get("backend", "cpu"),
        ),
        train=TrainConfig(
            steps=steps, batch=8, context=128, lr=0.003, warmup=min(40, steps), trace_every=10, hash_every=every,
            checkpoint_every=every,
        ),
        corpus="synthetic",
    )  # fmt: skip
    text = corpus.load(segment.corpus)

    class StopError(Exception):
        pass

    def stop(done: int, _: int) -> None:
        if done >= steps // 2 + 10:
            raise StopError

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def train(progress: Any) -> None:
            train_segment(
                segment,
                batches=Batches(data=text.train, batch=8, context=128, seed=seed),
                mechanism=Mechanism(),
                seed=seed,
                folder=folder,
                genesis="00" * 32,
                progress=progress,
            )

        if settings.get("stop"):
            with contextlib.suppress(StopError):
                train(stop)
        train(None)
        entries = [json.loads(line)["entry"] for line in (folder / "trace.jsonl").read_bytes().splitlines()]
    return {
        "weights": entries[-1]["weights"],
        "losses": [entry["loss"] for entry in entries if entry["type"] == "step"],
        "capability": numeric_environment("cpu").capability,
    }


def _process(settings: Mapping[str, Any], environment: Mapping[str, str]) -> "subprocess.Popen[str]":
    base = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "repro.bench.determinism", json.dumps(settings)],
        env={**os.environ, **base, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def _result(process: "subprocess.Popen[str]") -> dict[str, Any] | None:
    output, _ = process.communicate()
    return dict(json.loads(output)) if process.returncode == 0 else None


def _run(settings: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any] | None:
    other = _process({**settings, "seed": 7}, environment) if settings.get("beside") else None
    found = _result(_process(settings, environment))
    if other:
        other.kill()
        other.communicate()
    return found


_VERDICTS = """
import hashlib, platform, sys, scipy
from pathlib import Path
from records import canonical
from records.package import read_bundle
from repro.judge import judge
from repro.workflow.evidence import load
from repro.workflow.plan import parse_plan
files = read_bundle(Path(sys.argv[1]))
plan = parse_plan(files["plan.json"], name="plan")
outcome = canonical.dumps(judge(plan, load(plan, files).evidence))
print(platform.python_version(), scipy.__version__, hashlib.sha256(outcome).hexdigest())
"""


def _verdicts(interpreters: Sequence[str], bundles: Sequence[Path]) -> list[dict[str, Any]]:
    """The outcome that each interpreter judges, as a digest; `equal` is to that of the first."""
    rows: list[dict[str, Any]] = []
    for bundle in bundles:
        first = None
        for interpreter in (sys.executable, *interpreters):
            done = subprocess.run([interpreter, "-c", _VERDICTS, str(bundle)], capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
                rows.append({"bundle": bundle.name, "interpreter": interpreter, "failed": reason})
                continue
            version, scipy, digest = done.stdout.split()
            first = first or digest
            rows.append({"bundle": bundle.name, "python": version, "scipy": scipy, "equal": digest == first})
    return rows


def measure(
    *, steps: int = STEPS, interpreters: Sequence[str] = (), cases: Sequence[int] | None = None
) -> dict[str, Any]:
    """Every case against the base: bitwise or not, and how far traced losses lie apart (nats/token).

    `first` is the difference of the first ten steps' mean loss, `largest` that of any ten, `last` that of the last ten.
    """
    import torch

    base = _run({"steps": steps}, {})
    if base is None:
        raise RuntimeError("the base case did not run; see its error above")
    rows: list[dict[str, Any]] = []
    for number, (what, value, settings, environment) in enumerate(CASES):
        if cases is not None and number not in cases:
            continue
        found = _run({"steps": steps, **settings}, environment)
        if found is None:
            rows.append({"what": what, "value": value, "bitwise": None})
            continue
        apart = [abs(float(a) - float(b)) for a, b in zip(base["losses"], found["losses"], strict=True)]
        rows.append(
            {
                "what": what,
                "value": value,
                "bitwise": found["weights"] == base["weights"] and found["losses"] == base["losses"],
                "first": apart[0],
                "largest": max(apart),
                "last": apart[-1],
                "capability": found["capability"],
            }
        )
    root = Path(__file__).parents[2]
    return {
        "schema": "repro.bench-determinism/v1",
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "capability": base["capability"],
        "steps": steps,
        "cases": rows,
        "verdicts": _verdicts(interpreters, sorted(root.glob("papers/*/replications/*.repro.zip")))
        if interpreters
        else [],
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(one(json.loads(sys.argv[1]))))
