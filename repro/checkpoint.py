"""The files that a segment's training leaves: weights and optimizer state, one tensor by name, as safetensors.

- `weights_digest`: what traces and plans know weights by
- `save_checkpoint`, `load_checkpoint`: a segment under way or at its end, and the trace that it stands on
- `load_finished`, `load_final`: a finished segment's, once its trace has been found to name these weights

A file is written to a temporary name, synced and renamed: whatever is there under its own name is whole.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from records.errors import InvalidError, UsageError
from repro.mlp import make_model
from repro.model import ModelConfig, Transformer
from repro.trace import check_chain

if TYPE_CHECKING:  # brings torch's distributed parts, half a second that a process of its own has no use for
    from repro.cluster import Cluster


def weights_digest(model: torch.nn.Module, cluster: "Cluster | None" = None) -> str:
    """SHA-256 over every parameter and buffer: name, dtype, shape and little-endian bytes, in the order of names.

    With a `cluster`, `model` is this process' part, and the digest that of the whole: every process calls this.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_whole(model.state_dict(), cluster).items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()


def save_checkpoint(
    path: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    cluster: "Cluster | None",
    *,
    step: int,
    lines: int,
    genesis: str,
) -> None:
    """Writes weights, optimizer state and lineages after `step` steps, when the trace had so many `lines`.

    With a `cluster` every process calls this, and the first one writes.

    Raises:
        UsageError: the file cannot be written.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors = dict(_whole(tensors | _optimizer_tensors(model, optimizer), cluster))
    tensors |= {f"lineage.{name}": lineage_E for name, lineage_E in model.lineages.items()}
    if cluster and not cluster.leads:
        return
    temporary = path.with_suffix(".tmp")
    # one entry: safetensors writes several in an order that changes from process to process
    metadata = {"repro": json.dumps({"genesis": genesis, "lines": lines, "step": step})}
    try:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, temporary, metadata=metadata)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except SafetensorError as error:  # the library's own name for an OSError
        temporary.unlink(missing_ok=True)
        raise UsageError(f"cannot write {path}: {error}; free space and go on with --resume") from error


def _whole(tensors: Mapping[str, Tensor], cluster: "Cluster | None") -> Mapping[str, Tensor]:
    return cluster.gather(tensors) if cluster else tensors


def _optimizer_tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"optimizer.{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_checkpoint(
    path: Path, model: Transformer, optimizer: torch.optim.Optimizer | None, *, genesis: str
) -> tuple[int, int, dict[str, Tensor]]:
    """Puts a checkpoint into model and optimizer; returns (steps done, trace lines it stands on, all its tensors).

    Raises:
        UsageError: a file that cannot be read.
        InvalidError: no checkpoint, or that of another plan, segment or model.
    """
    try:
        path.open("rb").close()  # safetensors calls every reason "no such file"
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = json.loads((file.metadata() or {}).get("repro", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise InvalidError(
            f"{path}: expected a safetensors checkpoint, found {error}; delete it to start the segment again"
        ) from error
    if metadata.get("genesis") != genesis:
        raise InvalidError(
            f"{path}: the checkpoint belongs to another plan or segment; put back the segment's own, or choose another --out"
        )
    state = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in sorted(shapes.keys() | state.keys()):
        found = tuple(state[name].shape) if name in state else None
        if shapes.get(name) != found:
            raise InvalidError(
                f"{path}: the checkpoint is of another model: expected {name} of shape {shapes.get(name)}, found {found}; "
                "choose another --out"
            )
    model.load_state_dict(state)
    model.lineages = {n.removeprefix("lineage."): value for n, value in tensors.items() if n.startswith("lineage.")}
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            state = {
                key: tensors[f"optimizer.{key}.{name}"].to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"optimizer.{key}.{name}" in tensors
            }
            if state:
                optimizer.state[parameter] = state
    return metadata["step"], metadata["lines"], tensors


def load_final(config: ModelConfig, folder: Path, *, genesis: str, device: str = "cpu") -> tuple[Transformer, str]:
    """Trained model of a finished segment, whose model is `config`, and the trace's last chain value.

    Raises:
        InvalidError: the folder's trace or weights are not those of this segment.
    """
    model = make_model(config)
    _, head = load_finished(folder, model, None, genesis=genesis)
    return model.to(device), head


def load_finished(
    folder: Path, model: Transformer, optimizer: torch.optim.Optimizer | None, *, genesis: str
) -> tuple[dict[str, Tensor], str]:
    """Puts a finished segment's weights into `model`, and its optimizer state into `optimizer` if given.

    Returns all tensors of its file, and the last chain value of its trace, which starts from `genesis` and names the weights.

    Raises:
        InvalidError: the folder's trace or weights are not those of this segment.
    """
    path = folder / "trace.jsonl"
    entries, head = check_chain(path.read_bytes(), genesis, name=str(path))
    tensors = load_checkpoint(folder / "final.safetensors", model, optimizer, genesis=genesis)[2]
    if not entries or entries[-1].get("weights") != weights_digest(model):
        raise InvalidError(f"{folder / 'final.safetensors'}: the weights are not those that the trace ends with")
    return tensors, head
