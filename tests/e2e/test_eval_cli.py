"""`repro eval` as typed: a run's model, its results in the bundle, a public checkpoint, and no hub."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from command_line import repro
from safetensors.torch import load_file, save_file

from records import canonical, keys
from records.errors import InvalidError, UsageError
from repro.workflow.bundle import make_bundle, verify
from repro.workflow.subject import open_subject


def test_results_of_a_runs_model_are_bound_to_its_weights_in_the_bundle(smoke_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(smoke_run, tmp_path / "run"))
    weights = next(iter(sorted(run.glob("segments/*/final.safetensors"))))
    done = repro("eval", weights, "--tasks", "held_out=synthetic", "--k", "1,2", "--limit", "2", "--record", "--json")
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    assert [row["k"] for row in found["results"]] == [1, 2]
    assert all(float(row["metrics"]["bits_per_byte"]) > 4.3 for row in found["results"]), "the source has 3 bits a byte"
    (kept,) = run.glob("evals/*.json")
    assert kept.read_bytes() == done.stdout.rstrip(b"\n")
    assert str(tmp_path) not in kept.read_text()

    files = make_bundle(run, key=None)
    assert f"evals/{kept.name}" in files
    assert verify(files, target="x", trusted=keys.pinned()).state == "valid"
    other = canonical.dumps(found | {"weights": "0" * 64})
    name = f"evals/{canonical.sha256_hex(other)[:16]}.json"
    kept.unlink()
    (run / name).write_bytes(other)
    with pytest.raises(InvalidError, match="evaluates other weights than those"):
        make_bundle(run, key=None)
    (run / name).rename(run / "evals" / "renamed.json")
    with pytest.raises(InvalidError, match="expected its own digest as its name"):
        make_bundle(run, key=None)


def test_weights_that_are_not_the_traces(smoke_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(smoke_run, tmp_path / "run"))
    weights = next(iter(sorted(run.glob("segments/*/final.safetensors"))))
    assert open_subject(weights, device="cpu").run == run
    tensors = load_file(weights)
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    tensors["model.final_norm.gain_D"] += 1
    save_file(tensors, weights, metadata=metadata)
    with pytest.raises(InvalidError, match="not those that the trace ends with"):
        open_subject(weights, device="cpu")
    with pytest.raises(UsageError, match=r"expected segments/…/final\.safetensors of a run, or"):
        open_subject(tmp_path, device="cpu")


@torch.no_grad()
def test_a_public_checkpoint_is_a_subject(tmp_path: Path) -> None:
    config = transformers.OlmoeConfig(
        vocab_size=256, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_experts=4,
        num_experts_per_tok=2, max_position_embeddings=32, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    theirs = transformers.OlmoeForCausalLM(config)
    theirs.save_pretrained(tmp_path)
    found = open_subject(tmp_path, device="cpu")
    assert set(found.identity) == {"weights", "checkpoint"} and found.run is None
    tokens = torch.randint(0, 256, (1, 20))
    torch.testing.assert_close(found.model(tokens).logits_BSV, theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 257}))
    with pytest.raises(UsageError, match=r"expected tokenizer\.json, found none"):
        open_subject(tmp_path, device="cpu")


def test_a_task_of_the_hub_without_a_hub_is_one_line(smoke_run: Path, tmp_path: Path) -> None:
    weights = next(iter(sorted(smoke_run.glob("segments/*/final.safetensors"))))
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = repro("eval", weights, "--tasks", "arc_easy,gsm8k", "--k", "2", env=nowhere)
    assert (done.returncode, done.stderr.decode().count("\n"), done.stdout) == (5, 1, b"")
    assert (
        "arc_easy, gsm8k: http://127.0.0.1:9 cannot be reached; without it there are gsm8k=FILE" in done.stderr.decode()
    )
