"""Fixtures that several tests share: one real run at the smoke scale, its bundle, and a key."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import repro
from hypothesis import settings

from records import keys

# A loaded machine is no failure, and what CI finds it must find again; new examples are looked for by hand.
settings.register_profile("repro", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("repro")


@pytest.fixture(autouse=True)
def numeric_mode_put_back() -> Iterator[None]:
    """Training in this process sets what holds for the whole process, and hypothesis wants its denormals back.

    Random tensors are those of one seed, whatever ran before; REPRO_TEST_SEED asks for others.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(int(os.environ.get("REPRO_TEST_SEED", "0")))
    yield
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.set_flush_denormal(False)
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of EMoE at the smoke scale, made by the command line."""
    folder = tmp_path_factory.mktemp("smoke") / "run"
    done = repro("run", "emoe", "--scale", "smoke", "--out", folder)
    assert done.returncode == 4, done.stderr.decode()  # inconclusive by construction
    return folder


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh private key; its public half lies beside it."""
    path = tmp_path_factory.mktemp("keys") / "test.key"
    keys.save(keys.generate(), path)
    return path


@pytest.fixture(scope="session")
def smoke_bundle(smoke_run: Path, key_file: Path) -> Path:
    """Signed bundle of the smoke run."""
    path = smoke_run.with_name("smoke.repro.zip")
    done = repro("bundle", smoke_run, "-o", path, "--key", key_file)
    assert done.returncode == 0, done.stderr.decode()
    return path
