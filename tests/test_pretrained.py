"""Public checkpoints: the same logits as the architectures' own code, their published sizes, and folders that are not right."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from records.errors import InvalidError, MalformedError, UsageError
from repro import pretrained
from repro.accounting import accounting
from repro.model import Transformer
from repro.moe import TopK

SHAPE = {
    "vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 64, "pad_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OLMOE = transformers.OlmoeConfig(**SHAPE, intermediate_size=16, num_hidden_layers=2)
QWEN = transformers.Qwen3MoeConfig(
    **SHAPE, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3, head_dim=12, mlp_only_layers=[1],
    norm_topk_prob=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True,
)  # fmt: skip
MODELS = {"olmoe": (OLMOE, transformers.OlmoeForCausalLM), "qwen3_moe": (QWEN, transformers.Qwen3MoeForCausalLM)}


def saved(kind: str, folder: Path) -> torch.nn.Module:
    """A random model of the architecture, every parameter away from its initial value, saved as its own library does."""
    config, cls = MODELS[kind]
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="60KB" if kind == "olmoe" else "50GB")
    return model


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("olmoe")
    saved("olmoe", folder)
    return folder


@pytest.fixture
def folder(olmoe: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may spoil."""
    return Path(shutil.copytree(olmoe, tmp_path / "copy"))


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_the_architectures_own_code(kind: str, tmp_path: Path) -> None:
    theirs = saved(kind, tmp_path)
    found = pretrained.read(tmp_path)
    assert found.architecture == kind
    assert kind != "olmoe" or len(found.files) > 3, "more than one shard"
    model = Transformer(found.model, None)
    pretrained.load(found, model)
    tokens = torch.randint(0, 50, (2, 40))
    expected = theirs(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(model(tokens).logits_BSV, expected, rtol=2e-4, atol=2e-4)
    theirs.config.num_experts_per_tok = 4
    for layer in theirs.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.top_k = 4
    wider = model(tokens, TopK(4, found.model.renormalize)).logits_BSV
    torch.testing.assert_close(wider, theirs(tokens).logits, rtol=2e-4, atol=2e-4)
    assert not torch.allclose(wider, expected, atol=1e-2)


def test_the_published_sizes_follow_from_the_published_configs(tmp_path: Path) -> None:
    """6.92B/1.28B (arXiv 2409.02060, table 1) and 30.5B/3.3B (arXiv 2505.09388, table 2)."""
    (tmp_path / "model.safetensors").touch()
    sizes = {}
    for kind, config in (
        ("olmoe", {"hidden_size": 2048, "intermediate_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16,
                   "num_hidden_layers": 16, "num_experts": 64, "vocab_size": 50304, "clip_qkv": None}),
        ("qwen3_moe", {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "head_dim": 128,
                       "num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 48, "num_experts": 128,
                       "vocab_size": 151936, "mlp_only_layers": [], "norm_topk_prob": True, "rope_theta": 1e6}),
    ):  # fmt: skip
        full = config | {"model_type": kind, "num_experts_per_tok": 8, "max_position_embeddings": 4096}
        (tmp_path / "config.json").write_text(json.dumps(full))
        count = accounting(pretrained.read(tmp_path).model)
        sizes[kind] = (count.total, count.active)
    assert sizes["olmoe"] == (pytest.approx(6.92e9, rel=1e-3), pytest.approx(1.28e9, rel=3e-3))
    assert sizes["qwen3_moe"] == (pytest.approx(30.5e9, rel=2e-3), pytest.approx(3.3e9, rel=2e-2))


def test_the_digest_is_that_of_every_file(folder: Path) -> None:
    before = pretrained.read(folder).digest
    (folder / "generation_config.json").unlink()
    assert pretrained.read(folder).digest == before, "files that decide nothing do not count"
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    after = pretrained.read(folder).digest
    assert after != before
    with pytest.raises(InvalidError, match=f"expected the checkpoint {before[:12]}… of the plan, found {after[:12]}…"):
        pretrained.expect(before, folder)
    with pytest.raises(UsageError, match="say where it lies with --checkpoint DIR"):
        pretrained.expect(before, None)


def respell(folder: Path, change) -> None:
    """The checkpoint as one file, its tensors gone through `change`."""
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


GATE = "model.layers.1.mlp.gate.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(GATE), f"missing: {GATE}; superfluous: none"),
        (lambda tensors: tensors.update({"model.extra": torch.zeros(1)}), "missing: none; superfluous: model.extra"),
        (lambda tensors: tensors.update({GATE: torch.zeros(7, 32)}), rf"{GATE}: .*\(8, 32\), found .*\(7, 32\)"),
        (
            lambda tensors: tensors.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(16, 31)}),
            "model.layers.0.self_attn.q_proj.weight, model.layers.0.self_attn.k_proj.weight",
        ),
    ],
)
def test_tensors_that_are_not_the_architectures(folder: Path, change, message: str) -> None:
    respell(folder, change)
    found = pretrained.read(folder)
    with pytest.raises(MalformedError, match=message):
        pretrained.load(found, Transformer(found.model, None))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mixtral"}, "expected model_type olmoe or qwen3_moe, found 'mixtral'"),
        ({"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "expected rope_type default"),
        ({"num_experts": "64"}, "expected num_experts as an integer, found '64'"),
        ({"num_experts_per_tok": 9}, "top_k of at most num_experts=8, found 9"),
    ],
)
def test_an_architecture_that_the_model_lacks(folder: Path, fields: dict[str, object], message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(MalformedError, match=message):
        pretrained.read(folder)


def test_a_folder_that_is_not_whole(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"found no config\.json"):
        pretrained.read(tmp_path)
    found = pretrained.read(folder)
    with pytest.raises(InvalidError, match=r"of another shape than the model: d_expert 16 \(model: 8\)"):
        pretrained.load(found, Transformer(dataclasses.replace(found.model, d_expert=8), None))
    shards = sorted(folder.glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-100])
    with pytest.raises(MalformedError, match=f"{shards[0].name}: expected a safetensors file"):
        pretrained.load(found, Transformer(found.model, None))
    shards[0].unlink()
    with pytest.raises(UsageError, match=f"{shards[0].name} is missing"):
        pretrained.read(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../config.safetensors"}}))
    with pytest.raises(MalformedError, match="names of safetensors files beside it"):
        pretrained.read(folder)
