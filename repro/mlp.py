"""A classifier with one MoE layer, for coordinate checks, and the choice between it and the transformer.

- `Mlp`: readout(MoE(gelu(x·W))) on records of bytes (the corpus `classification`)
- `gelu_experts`: its experts, computed all at once
- `make_model`: the model of a config
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from records.errors import UsageError
from repro.model import KeyValueCache, ModelConfig, ModelOutput, Transformer, make_moe
from repro.moe import Routing, RoutingRule

_BYTE_STD = ((256**2 - 1) / 12) ** 0.5  # of 0 … 255, all equally likely


class Mlp(Transformer):
    """A classifier of records of bytes with one MoE layer: readout(MoE(gelu(x·W))), no residual and no norm.

    The model of the coordinate checks of arXiv 2605.14200, and a `Transformer` only in what the training loop asks of one.
    Its experts are gelu(x·U)·D, `w_up_EDF` (E, D, F); all else of the layer is the core's. Of each row of tokens the first
    belongs to the record before; the others, made to have mean 0 and variance 1 were they evenly distributed, are the
    input.
    """

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.lineages: dict[str, Tensor] = {}
        self.w_in_ID = nn.Parameter(torch.empty(config.context - 1, config.d_model))
        self.ffn = make_moe(config, "ffn")
        self.ffn.w_up_EDF = nn.Parameter(torch.empty(config.num_experts, config.d_model, config.d_expert))
        self.ffn.experts = gelu_experts
        self.unembedding_VD = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        if seed is not None:
            self.init_weights(seed)

    def forward(
        self, tokens_BS: Tensor, rule: RoutingRule | None = None, cache: KeyValueCache | None = None
    ) -> ModelOutput:
        """Logits (B, 1, V) of each row's class: the last of its next tokens."""
        if tokens_BS.shape[1] != self.config.context:
            raise UsageError(f"model: expected records of {self.config.context} tokens, found {tokens_BS.shape[1]}")
        x_BI = (tokens_BS[:, 1:].to(self.w_in_ID.dtype) - 127.5) / _BYTE_STD
        y_BD, router = self.ffn.forward_with_router(nnf.gelu(x_BI @ self.w_in_ID), rule)
        return ModelOutput((y_BD @ self.unembedding_VD.t())[:, None], (router,))


def gelu_experts(x_TD: Tensor, routing: Routing, w_up_EDF: Tensor, w_down_EFD: Tensor, backend: str) -> Tensor:
    """Weighted sum (T, D) of experts gelu(x·U)·D, as two products over all experts with zero for those not chosen.

    Where half of the experts are active, as in the checks this is for, that is faster than picking rows. `backend` is not
    used: there is one.
    """
    gate_TE = x_TD.new_zeros(routing.num_tokens, routing.num_experts)
    gate_TE = gate_TE.index_put((routing.token_N, routing.expert_N), routing.weight_N.to(x_TD.dtype))
    E, D, F = w_up_EDF.shape
    h_TEF = nnf.gelu(x_TD @ w_up_EDF.transpose(0, 1).reshape(D, E * F)).view(-1, E, F)
    return (h_TEF * gate_TE[..., None]).flatten(1) @ w_down_EFD.reshape(E * F, D)


def make_model(config: ModelConfig, seed: int | None = 0) -> Transformer:
    """The model of a config, on the CPU; for `seed` see `Transformer`."""
    return Mlp(config, seed) if config.kind == "mlp" else Transformer(config, seed)
