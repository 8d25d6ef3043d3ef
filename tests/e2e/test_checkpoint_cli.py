"""Post-training of a public checkpoint as typed: run, bundle, audit, and the wrong checkpoint or none."""

import json
from pathlib import Path

import pytest
import transformers
from command_line import repro


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OLMoE of 8 experts over bytes."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = transformers.OlmoeConfig(
        vocab_size=256, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_experts=8,
        num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.OlmoeForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_checkpoint_is_trained_further_and_audited(checkpoint: Path, tmp_path: Path) -> None:
    command = ("run", "emoe", "--scale", "smoke", "--claims", "A1-post", "--out", tmp_path / "run")
    done = repro(*command, "--checkpoint", checkpoint)
    assert done.returncode == 4, done.stderr.decode()
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    segments = [segment for arm in plan["arms"] for segment in arm["segments"]]
    assert len({segment["checkpoint"] for segment in segments}) == 1
    assert {segment["model"]["qk_norm"] for segment in segments} == {"width"}
    assert str(checkpoint) not in json.dumps(plan)
    bundle = tmp_path / "run.repro.zip"
    assert repro("bundle", tmp_path / "run", "-o", bundle).returncode == 0

    done = repro("audit", bundle, "--seed", 1, "--checkpoint", checkpoint)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"environment, code and corpora are the plan's") and b"bitwise" in done.stdout
    done = repro("audit", bundle, "--seed", 1)
    assert (done.returncode, b"say where it lies with --checkpoint DIR" in done.stderr) == (4, True)


def test_a_paper_that_starts_from_no_checkpoint(checkpoint: Path) -> None:
    done = repro("plan", "emo", "--scale", "smoke", "--checkpoint", checkpoint)
    assert (done.returncode, b"leave --checkpoint out" in done.stderr) == (2, True)
