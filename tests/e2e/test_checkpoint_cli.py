"""Post-training of a public checkpoint as typed: run, bundle, audit, and the wrong checkpoint or none."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from command_line import repro

from records.errors import IndeterminateError, UsageError
from repro.data import corpus
from repro.data.prepare import prepare
from repro.data.sources import open_source
from repro.data.tokens import Tokenizer, open_tokenizer, train_bpe
from repro.pretrained import read
from repro.workflow.audit import draw, mismatches
from repro.workflow.plan import _check_vocabulary, paper_module


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
    with pytest.raises(IndeterminateError, match="say where it lies with --checkpoint DIR"):
        mismatches(plan, draw(plan, arms=1, segments=0, seed=1))


def test_the_corpus_has_to_be_in_the_checkpoints_own_tokens(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    """A design like `base`: its text is data:instructions, prepared with the checkpoint's tokenizer, or refused."""
    monkeypatch.setenv("REPRO_DATA", str(tmp_path / "data"))
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Question {n}: what follows {n}? Answer: {n + 1}." for n in range(200)))
    source = open_source(str(text), split_on="\n\n")
    (folder / "tokenizer.json").write_bytes(train_bpe(source.documents(), 258).data)
    whole = paper_module("emoe").design("smoke", checkpoint=read(folder))
    arms = [
        replace(arm, segments=tuple(replace(s, corpus="data:instructions") for s in arm.segments)) for arm in whole.arms
    ]
    prepare(source, "instructions", tokenizer=Tokenizer())
    with pytest.raises(
        UsageError, match=r"expected tokens of the checkpoint's tokenizer\.json .* found those of bytes"
    ):
        _check_vocabulary(arms, folder)
    shutil.rmtree(tmp_path / "data")
    corpus.load.cache_clear()
    tokenizer = open_tokenizer(str(folder))
    assert isinstance(tokenizer, Tokenizer)
    prepare(source, "instructions", tokenizer=tokenizer)
    with pytest.raises(UsageError, match="at most the model's 256 different tokens, found 258"):
        _check_vocabulary(arms, folder)


def test_a_paper_that_starts_from_no_checkpoint(checkpoint: Path) -> None:
    done = repro("plan", "emo", "--scale", "smoke", "--checkpoint", checkpoint)
    assert (done.returncode, b"leave --checkpoint out" in done.stderr) == (2, True)
