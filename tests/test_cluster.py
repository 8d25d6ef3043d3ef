"""Training spread over two gloo processes is that of one process, to rounding, and leaves the same kind of files."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor

from records.errors import UsageError
from repro.cluster import PARALLEL, Cluster, Layout, layout
from repro.data.batches import Batches
from repro.inherit import Parent
from repro.model import ModelConfig
from repro.moe.growth import Growth
from repro.train import Mechanism, Segment, TrainConfig, train_segment

SIZE = 2
FIRST = Segment(
    model=ModelConfig(
        d_model=16, d_expert=8, num_layers=2, num_heads=2, num_experts=4, top_k=2, context=8, score="sigmoid",
        selection_bias=True, d_shared=8,
    ),
    train=TrainConfig(
        steps=12, batch=4, context=8, lr=3e-3, warmup=2, bias_rate=1e-2, trace_every=2, hash_every=6, checkpoint_every=6,
        probe_every=6,
    ),
    corpus="synthetic",
)  # fmt: skip
SECOND = replace(
    FIRST,
    model=replace(FIRST.model, num_experts=8),
    train=replace(FIRST.train, first_step=12),
    inherit="all",
    growth=Growth(experts="random", router="random"),
)
PARENT_GENESIS, GENESIS = "1" * 64, "2" * 64


class KilledError(Exception):
    pass


def train(folder: Path, cluster: Cluster | None = None, *, stop: int | None = None) -> None:
    """Both segments; with `stop`, the second one dies on the spot after so many steps."""

    def progress(steps: int, tokens: int) -> None:
        if steps == stop:
            raise KilledError

    data = bytes(range(97, 123)) * 400
    common: dict[str, Any] = {
        "batches": Batches(data=memoryview(data), batch=4, context=8, seed=3), "mechanism": Mechanism(), "seed": 3,
        "cluster": cluster,
    }  # fmt: skip
    if not (folder / "a" / "final.safetensors").exists():
        train_segment(FIRST, folder=folder / "a", genesis=PARENT_GENESIS, **common)
        if cluster:
            cluster.wait()
    parent = Parent(folder=folder / "a", model=FIRST.model, genesis=PARENT_GENESIS)
    train_segment(SECOND, folder=folder / "b", genesis=GENESIS, parent=parent, progress=progress, **common)


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for number, parallel in enumerate(PARALLEL):
        os.environ["MASTER_PORT"] = str(port + number)
        with Cluster(Layout(processes=SIZE, parallel=parallel), "cpu") as cluster:
            train(Path(folder) / parallel, cluster)
            if parallel == "fsdp+experts":
                with pytest.raises(KilledError):
                    train(Path(folder) / "killed", cluster, stop=8)
                with pytest.raises(UsageError, match="multiple of the 2 processes, found 3"):
                    cluster.share(torch.zeros(3, 1))
                with pytest.raises(UsageError, match=r"--parallel fsdp\+experts: .*gradients.*use --parallel ddp"):
                    train_segment(
                        FIRST, batches=Batches(data=memoryview(bytes(200)), batch=4, context=8, seed=0),
                        mechanism=Scaling(), seed=0, folder=Path(folder) / "refused", genesis=GENESIS, cluster=cluster,
                    )  # fmt: skip


class Scaling(Mechanism):
    def gradients(self, model: Any) -> None:
        raise AssertionError("never reached")


def trace(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["entry"] for line in (folder / "trace.jsonl").read_text().splitlines()]


def close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    assert found.keys() == expected.keys()
    errors = {name: (found[name] - value).double().norm() / value.double().norm() for name, value in expected.items()}
    return all(error < 1e-4 or not expected[name].any() for name, error in errors.items())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "alone")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(worker, (port, str(folder)), nprocs=SIZE)
    return folder


@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("part", ["a", "b"])
def test_two_processes_train_what_one_does(runs: Path, parallel: str, part: str) -> None:
    alone, spread = runs / "alone" / part, runs / parallel / part
    for mine, theirs in zip(trace(spread), trace(alone), strict=True):
        assert mine.keys() == theirs.keys()
        for name in ("loss", "grad_norm"):
            if name in theirs:
                assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-4)
        if theirs["type"] == "probe":
            assert mine["load"] == theirs["load"]
    # weights, biases and the optimizer's state, whole
    assert close(load_file(spread / "final.safetensors"), load_file(alone / "final.safetensors"))


def test_a_spread_run_that_was_killed_goes_on_in_one_process(runs: Path) -> None:
    folder = runs / "killed"
    assert (folder / "b" / "checkpoint.safetensors").exists()
    assert not (folder / "b" / "final.safetensors").exists()
    train(folder)
    assert close(load_file(folder / "b" / "final.safetensors"), load_file(runs / "alone" / "b" / "final.safetensors"))
    assert len(trace(folder / "b")) == len(trace(runs / "alone" / "b"))


def test_layouts_come_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert layout(None) is None
    with pytest.raises(UsageError, match="found one: start it as torchrun"):
        layout("fsdp")
    with pytest.raises(UsageError, match="found 'tensor'"):
        layout("tensor")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert str(layout("fsdp+experts")) == "8 processes, fsdp+experts"
    assert layout(None) == Layout(processes=8, parallel="ddp")


def test_the_command_under_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "repro", "run", "emoe", "--scale", "smoke", "--seeds", "1"]
    command += ["--claims", "A1", "--parallel", "fsdp+experts", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["environment"]["layout"] == "2 processes, fsdp+experts"
    judged = subprocess.run(
        [sys.executable, "-m", "repro", "judge", str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert judged.returncode == 4, judged.stderr  # smoke decides nothing
