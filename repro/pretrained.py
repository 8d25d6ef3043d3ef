"""Public Mixture-of-Experts checkpoints (OLMoE, Qwen3-MoE) as the start of a training or the subject of an evaluation.

- `read`: a folder of config.json and safetensors files, its architecture as a `ModelConfig`, its identity as a digest
- `expect`: the same, if it is the one that a plan names
- `load`: its weights, mapped by name, in a `Transformer`; logits equal those of the architecture's own code to rounding

Rotary positions here turn neighbouring channels (2c, 2c + 1), theirs the channels c and c + C/2: the rows of queries and
keys, and the gains of their norms, are put into our order, which changes no product of a query with a key.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from records.errors import InvalidError, MalformedError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from repro.model import ModelConfig, Transformer

NOT_AT_HAND = "not at hand"
"""Takes the place of a digest in a plan that is made for its cost alone."""
INDEX, SINGLE, CONFIG, TOKENIZER = "model.safetensors.index.json", "model.safetensors", "config.json", "tokenizer.json"
FREE = ("context", "top_k", "renormalize", "backend")
"""Fields that a segment may set otherwise than the checkpoint's config: no weight depends on them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """A checkpoint folder: its files by name, and the SHA-256 that names them; see `digest` in docs/evidence.md."""

    folder: Path
    digest: str
    files: tuple[str, ...]
    architecture: str
    model: "ModelConfig"

    @property
    def tokenizer(self) -> Path | None:
        """Its tokenizer.json, if it has one."""
        return self.folder / TOKENIZER if TOKENIZER in self.files else None


def read(folder: Path) -> Pretrained:
    """The checkpoint in `folder`, every file of it read and hashed, no weight loaded.

    Raises:
        UsageError: no such folder, or a file of it is missing.
        MalformedError: a config that is not that of a supported architecture, or that asks for what the model lacks.
    """
    if not (folder / CONFIG).is_file():
        raise UsageError(
            f"{folder}: expected a checkpoint folder with {CONFIG} and safetensors files, found no {CONFIG}"
        )
    config = _json(folder / CONFIG)
    architecture, model = _model_config(config, folder / CONFIG)
    files = _weight_files(folder)
    files += [name for name in (CONFIG, INDEX, TOKENIZER) if (folder / name).is_file()]
    lines = []
    for name in sorted(files):
        try:
            with (folder / name).open("rb") as file:
                lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
        except OSError as error:
            raise UsageError(f"cannot read {folder / name}: {error.strerror}") from error
    return Pretrained(
        folder=folder,
        digest=hashlib.sha256("".join(lines).encode()).hexdigest(),
        files=tuple(sorted(files)),
        architecture=architecture,
        model=model,
    )


def expect(digest: str, folder: Path | None) -> Pretrained:
    """The checkpoint of that digest, which has to be the one in `folder`.

    Raises:
        UsageError: no folder was given.
        InvalidError: the folder holds another checkpoint.
    """
    if folder is None:
        raise UsageError(f"the plan starts from the checkpoint {digest[:12]}…: say where it lies with --checkpoint DIR")
    found = read(folder)
    if found.digest != digest:
        raise InvalidError(
            f"{folder}: expected the checkpoint {digest[:12]}… of the plan, found {found.digest[:12]}…: the files differ"
        )
    return found


def load(found: Pretrained, model: "Transformer") -> None:
    """Puts the checkpoint's weights into `model`, tensor by tensor, in the model's own dtype and on its device.

    Raises:
        InvalidError: the model's shape is not the checkpoint's.
        MalformedError: a file that is no safetensors file, or a tensor that is missing, superfluous or of another shape.
    """
    import torch

    fitting = replace(found.model, **{name: getattr(model.config, name) for name in FREE})
    if fitting != model.config:
        differing = [name for name in fitting.__slots__ if getattr(fitting, name) != getattr(model.config, name)]
        pairs = ", ".join(f"{n} {getattr(fitting, n)} (model: {getattr(model.config, n)})" for n in differing)
        raise InvalidError(f"{found.folder}: the checkpoint is of another shape than the model: {pairs}")
    where = _locate(found)
    wanted = {name for names in _sources(found.model).values() for name in names}
    if found.model.tie_embeddings:
        where.pop("lm_head.weight", None)
    missing, extra = sorted(wanted - set(where)), sorted(set(where) - wanted)
    if missing or extra:
        raise MalformedError(
            f"{found.folder}: expected the tensors of {found.architecture}; missing: {_some(missing)}; "
            f"superfluous: {_some(extra)}"
        )
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in _converted(found, where):
            parameter = parameters[name]
            if value.shape != parameter.shape:
                sources = _some(_sources(found.model)[name])
                raise MalformedError(
                    f"{found.folder}: {sources}: expected a shape that gives {name} of {tuple(parameter.shape)}, found "
                    f"one that gives {tuple(value.shape)}"
                )
            parameter.copy_(value)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"


def _json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{path}: expected JSON, found {error}") from error
    if not isinstance(value, dict):
        raise MalformedError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


_DEFAULTS: dict[str, dict[str, Any]] = {
    # What a config.json may leave out, because the architecture's own code fills it in.
    "olmoe": {"rms_norm_eps": 1e-5, "norm_topk_prob": False, "head_dim": None, "rope_theta": 10_000.0},
    "qwen3_moe": {"rms_norm_eps": 1e-6, "norm_topk_prob": False, "decoder_sparse_step": 1, "rope_theta": 10_000.0},
}
_ABSENT = (
    # (field, values that leave it out): what the model here does not have
    ("attention_bias", (False, None)),
    ("clip_qkv", (None,)),
    ("use_sliding_window", (False, None)),
    ("hidden_act", ("silu", None)),
    ("rope_scaling", (None,)),
)


def _model_config(config: Mapping[str, Any], path: Path) -> tuple[str, "ModelConfig"]:
    from repro.model import ModelConfig

    kind = config.get("model_type")
    if kind not in _DEFAULTS:
        raise MalformedError(
            f"{path}: expected model_type {' or '.join(_DEFAULTS)}, found {str(kind)[:60]!a}: no such architecture here"
        )
    for name, allowed in _ABSENT:
        if config.get(name) not in allowed:
            raise MalformedError(
                f"{path}: {name} {str(config[name])[:60]} is not supported: expected {allowed[0]} or none"
            )
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise MalformedError(f"{path}: expected rope_type default, found {str(rope)[:60]}")
    values = {**_DEFAULTS[kind], **config, **({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})}

    def number(name: str, of: type[int] | type[float] = int) -> Any:
        value = values.get(name)
        if type(value) is not of and not (of is float and type(value) is int):
            raise MalformedError(
                f"{path}: expected {name} as {'an integer' if of is int else 'a number'}, found {value!a}"
            )
        return of(value)

    layers = number("num_hidden_layers")
    experts = "num_experts" if "num_experts" in values else "num_local_experts"
    shape: dict[str, Any] = {
        "vocab_size": number("vocab_size"),
        "d_model": number("hidden_size"),
        "num_layers": layers,
        "num_heads": number("num_attention_heads"),
        "num_kv_heads": number("num_key_value_heads"),
        "context": number("max_position_embeddings"),
        "num_experts": number(experts),
        "top_k": number("num_experts_per_tok"),
        "renormalize": values["norm_topk_prob"] is True,
        "rope_theta": number("rope_theta", float),
        "norm_eps": number("rms_norm_eps", float),
        "tie_embeddings": values.get("tie_word_embeddings") is True,
    }
    if kind == "olmoe":
        shape |= {"d_expert": number("intermediate_size"), "qk_norm": "width"}
    else:
        dense, step = values.get("mlp_only_layers") or [], number("decoder_sparse_step")
        if not isinstance(dense, list) or step < 1:
            raise MalformedError(f"{path}: expected mlp_only_layers as a list and decoder_sparse_step of at least 1")
        blocks = tuple(layer for layer in range(layers) if layer in dense or (layer + 1) % step)
        shape |= {"d_expert": number("moe_intermediate_size"), "qk_norm": "head", "dense_blocks": blocks}
        shape |= {"d_dense": number("intermediate_size")} if blocks else {}
        shape |= {"d_head": number("head_dim")} if values.get("head_dim") else {}
    try:
        return kind, ModelConfig(**shape)
    except UsageError as error:
        raise MalformedError(f"{path}: {error}") from error


def _weight_files(folder: Path) -> list[str]:
    if not (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            return [SINGLE]
        raise UsageError(f"{folder}: expected {SINGLE} or {INDEX}, found neither")
    names = _json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise MalformedError(f"{folder / INDEX}: expected weight_map, an object of tensor and file names")
    files = sorted(set(names.values()))
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise MalformedError(
                f"{folder / INDEX}: expected the names of safetensors files beside it, found {name[:60]!a}"
            )
        if not (folder / name).is_file():
            raise UsageError(f"{folder}: {name} is missing, which {INDEX} names: fetch the checkpoint again")
    return files


def _locate(found: Pretrained) -> dict[str, str]:
    """File of every tensor."""
    from safetensors import SafetensorError, safe_open

    where: dict[str, str] = {}
    for file in found.files:
        if not file.endswith(".safetensors"):
            continue
        try:
            with safe_open(found.folder / file, framework="pt", device="cpu") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    if name in where:
                        raise MalformedError(f"{found.folder}: tensor {name} is in both {where[name]} and {file}")
                    if not name.endswith("rotary_emb.inv_freq"):  # a table, which older writers kept
                        where[name] = file
        except (SafetensorError, OSError) as error:
            raise MalformedError(f"{found.folder / file}: expected a safetensors file, found {error}") from error
    return where


def _sources(config: "ModelConfig") -> dict[str, list[str]]:
    """For each of our parameters the tensors that it is made of."""
    sources = {"embedding_VD": ["model.embed_tokens.weight"], "final_norm.gain_D": ["model.norm.weight"]}
    if not config.tie_embeddings:
        sources["unembedding_VD"] = ["lm_head.weight"]
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        attention = f"{theirs}.self_attn"
        sources |= {
            f"{ours}.attention_norm.gain_D": [f"{theirs}.input_layernorm.weight"],
            f"{ours}.attention.w_qkv_DD": [f"{attention}.{part}_proj.weight" for part in "qkv"],
            f"{ours}.attention.w_out_DD": [f"{attention}.o_proj.weight"],
            f"{ours}.attention.q_norm.gain_D": [f"{attention}.q_norm.weight"],
            f"{ours}.attention.k_norm.gain_D": [f"{attention}.k_norm.weight"],
            f"{ours}.ffn_norm.gain_D": [f"{theirs}.post_attention_layernorm.weight"],
        }
        if config.is_dense(layer):
            sources[f"{ours}.ffn.w_up_DF"] = [f"{theirs}.mlp.{part}_proj.weight" for part in ("gate", "up")]
            sources[f"{ours}.ffn.w_down_FD"] = [f"{theirs}.mlp.down_proj.weight"]
            continue
        experts = [f"{theirs}.mlp.experts.{expert}" for expert in range(config.num_experts)]
        sources[f"{ours}.ffn.router_ED"] = [f"{theirs}.mlp.gate.weight"]
        sources[f"{ours}.ffn.w_up_EDF"] = [f"{e}.{part}_proj.weight" for e in experts for part in ("gate", "up")]
        sources[f"{ours}.ffn.w_down_EFD"] = [f"{e}.down_proj.weight" for e in experts]
    return sources


def _converted(found: Pretrained, where: Mapping[str, str]) -> Iterator[tuple[str, "Tensor"]]:
    """Our parameters one after the other, made of the checkpoint's tensors."""
    import torch
    from safetensors import safe_open

    heads = found.model.head_width
    with contextlib.ExitStack() as stack:
        open_files = {
            file: stack.enter_context(safe_open(found.folder / file, framework="pt", device="cpu"))
            for file in sorted(set(where.values()))
        }
        for name, sources in _sources(found.model).items():
            parts = [open_files[where[source]].get_tensor(source) for source in sources]
            leaf = name.rpartition(".")[2]
            try:
                if leaf == "w_qkv_DD":
                    parts = [_neighbours(parts[0], heads), _neighbours(parts[1], heads), parts[2]]
                if leaf in ("w_qkv_DD", "w_out_DD", "w_up_DF", "w_down_FD"):
                    yield name, torch.cat(parts).t()
                elif leaf == "w_up_EDF":
                    yield name, torch.stack([torch.cat(pair).t() for pair in zip(parts[::2], parts[1::2], strict=True)])
                elif leaf == "w_down_EFD":
                    yield name, torch.stack([part.t() for part in parts])
                elif name.endswith(("q_norm.gain_D", "k_norm.gain_D")):
                    yield name, _neighbours(parts[0], heads)
                else:
                    yield name, parts[0]
            except RuntimeError as error:  # shapes that do not go together
                raise MalformedError(f"{found.folder}: {_some(sources)}: {str(error).splitlines()[0]}") from error


def _neighbours(rows: "Tensor", width: int) -> "Tensor":
    """Rows of heads of `width`, with those c and c + width/2 of a head put side by side."""
    return rows.reshape(-1, 2, width // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
