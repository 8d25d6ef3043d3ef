"""Other libraries' experts on a routing of ours, for `repro bench moe`: what takes part where it is installed.

- `transformers`, `transformers-eager`: the experts of Qwen3-MoE, by its grouped GEMMs and by its loop
- `liger`: Liger's fused MoE, in Triton. Its own search for tiles is off unless LIGER_FUSED_MOE_AUTOTUNE=1 is set: it compiles
  some 200 kernels for each pair of widths
- `sonic`: SonicMoE's general routing, on a GPU alone. Its releases ask for torch 2.9.1 at most, so an environment of ours
  holds it only where somebody put it there against that

Each takes the weights in its own layout, made from ours beforehand; a gradient comes back in that layout, with no transposition
counted. `versions` names who was there.
"""

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from repro.moe import Routing

Forward = Callable[[], Tensor]
NAMES = ("transformers", "transformers-eager", "liger", "sonic")
_PACKAGES = {"transformers": "transformers", "liger": "liger-kernel", "sonic": "sonic-moe"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What every contestant gets. `gate_TK` and the routing's weights are the same numbers; `even`: no slot is empty."""

    x_TD: Tensor
    routing: Routing
    slots_TK: Tensor
    gate_TK: Tensor
    w_up_EDF: Tensor
    w_down_EFD: Tensor
    even: bool


class AbsentError(Exception):
    """This peer can't take part here; the message says why."""


def peers(inputs: Inputs) -> tuple[dict[str, tuple[Forward, tuple[Tensor, ...]]], dict[str, str]]:
    """Each peer's forward pass with the tensors that it is differentiated in; and of those that are absent, why."""
    makers: dict[str, Callable[[Inputs], tuple[Forward, tuple[Tensor, ...]]]] = {
        "transformers": partial(_transformers, how="grouped_mm"),
        "transformers-eager": partial(_transformers, how="eager"),
        "liger": _liger,
        "sonic": _sonic,
    }
    found, absent = {}, {}
    for name, make in makers.items():
        try:
            found[name] = make(inputs)
        except AbsentError as error:
            absent[name] = str(error)
        except Exception as error:  # foreign code, at any version
            absent[name] = first_line(error)
    return found, absent


def first_line(error: Exception) -> str:
    """Kind and first line of an error of foreign code, at most 300 characters."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


def versions() -> dict[str, str]:
    """Version of each peer's package that is installed."""
    found = {}
    for name, package in _PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "liger" in found:
        tuned = os.environ.get("LIGER_FUSED_MOE_AUTOTUNE") == "1"
        found["liger"] += ", its tiles searched for" if tuned else ", its fixed tiles"
    return found


def transformers_experts(inputs: Inputs, how: str) -> torch.nn.Module:
    """The experts of transformers' Qwen3-MoE: (x (T, D), experts (T, K), weights (T, K)) to (T, D)."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    E, F, D = inputs.w_down_EFD.shape
    config = Qwen3MoeConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        num_experts=E,
        num_experts_per_tok=inputs.slots_TK.shape[1],
        experts_implementation=how,
    )
    with torch.device("meta"):
        experts: torch.nn.Module = Qwen3MoeExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(_transposed(inputs.w_up_EDF))
    experts.down_proj = torch.nn.Parameter(_transposed(inputs.w_down_EFD))
    return experts


def _transformers(inputs: Inputs, how: str) -> tuple[Forward, tuple[Tensor, ...]]:
    _need("transformers", inputs, uneven=False)
    experts = transformers_experts(inputs, how)
    run = partial(experts, inputs.x_TD, inputs.slots_TK, inputs.gate_TK)
    return run, (inputs.x_TD, inputs.gate_TK, *experts.parameters())


def _liger(inputs: Inputs) -> tuple[Forward, tuple[Tensor, ...]]:
    if inputs.x_TD.device.type != "cuda":
        raise AbsentError("needs a GPU")
    _need("liger_kernel", inputs, uneven=False)
    return liger_experts(inputs)


def liger_experts(inputs: Inputs) -> tuple[Forward, tuple[Tensor, ...]]:
    """Liger's fused MoE, with x, the weights of the slots and the experts in its layout."""
    os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")  # it looks when it is imported
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    up, down = (_transposed(w).requires_grad_() for w in (inputs.w_up_EDF, inputs.w_down_EFD))
    slots_TK = inputs.slots_TK.to(torch.int32)
    run = partial(LigerFusedMoEFunction.apply, inputs.x_TD, up, down, slots_TK, inputs.gate_TK)
    return run, (inputs.x_TD, inputs.gate_TK, up, down)


def _sonic(inputs: Inputs) -> tuple[Forward, tuple[Tensor, ...]]:
    if inputs.x_TD.device.type != "cuda":
        raise AbsentError("needs a GPU")
    _need("sonicmoe", inputs, uneven=True)
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    # Experts last by name and first in memory.
    up, down = (_transposed(w).permute(1, 2, 0).requires_grad_() for w in (inputs.w_up_EDF, inputs.w_down_EFD))
    routing = inputs.routing
    weight_N = routing.weight_N.detach().float().requires_grad_()
    token_N, expert_N = routing.token_N.to(torch.int32), routing.expert_N.to(torch.int32)
    stream = torch.cuda.current_stream().cuda_stream

    def run() -> Tensor:
        y_TD: Tensor = moe_general_routing_inputs(
            inputs.x_TD, weight_N, token_N, expert_N, up, None, down, None, routing.num_experts, stream,
            ActivationType.SWIGLU, concat_layout=True,
        )[0]  # fmt: skip
        return y_TD

    return run, (inputs.x_TD, weight_N, up, down)


def _need(module: str, inputs: Inputs, *, uneven: bool) -> None:
    if importlib.util.find_spec(module) is None:
        raise AbsentError(f"{module} is not installed")
    if not uneven and not inputs.even:
        raise AbsentError("takes the same number of experts for every token")


def _transposed(w_EIJ: Tensor) -> Tensor:
    return w_EIJ.detach().transpose(1, 2).contiguous()
