"""Parameters and FLOPs of a model, counted from its config alone."""

from dataclasses import dataclass

from repro.model import ModelConfig


@dataclass(frozen=True, slots=True)
class Accounting:
    """Parameters and FLOPs of a config; the non-vocabulary counts leave out embedding and readout.

    flops_forward   2·(active non-vocabulary parameters + V·D) + attention, per token
    flops_training  3 · flops_forward: the backward pass does each GEMM twice
    """

    total: int
    active: int
    total_non_vocab: int
    active_non_vocab: int
    flops_forward: int
    flops_training: int


def accounting(config: ModelConfig) -> Accounting:
    """Count parameters and FLOPs/token from the config alone.

    A GEMM costs 2 FLOPs a weight a token forward and twice that backward (arXiv 2001.08361, section 2.1), hence
    6·N_active for training. Attention's QKᵀ and AV cost 4·D·S a token and layer forward, 12·D·S·L for training (D being the
    width of all query heads), as if each position saw all S = `context` positions: the convention of arXiv 2204.02311,
    appendix B, and of arXiv 2506.12119 (M = 6·N_a + 12·D·S·L), to whose form the readout's GEMM (6·V·D) is added here.
    Norms, rotary positions and activations are left out.
    """
    D, L = config.d_model, config.num_layers
    if config.kind == "mlp":
        return _accounting_mlp(config)
    q_width, kv_width = config.num_heads * config.head_width, config.kv_heads * config.head_width
    norms = (2 * L + 1) * D
    norms += L * {"none": 0, "head": 2 * config.head_width, "width": q_width + kv_width}[config.qk_norm]
    attention = 2 * D * (q_width + kv_width) * L
    dense = 3 * D * sum(config.dense_width(layer) for layer in range(L) if config.is_dense(layer))
    moe_layers = config.moe_layers
    router = config.num_experts * D * moe_layers
    shared = 3 * D * config.d_shared * moe_layers
    expert = 3 * D * config.d_expert * moe_layers
    always = attention + dense + router + shared
    vocab = config.vocab_size * D * (1 if config.tie_embeddings else 2)
    matrices_active = always + config.top_k * expert
    total_non_vocab = always + config.num_experts * expert + norms
    forward = 2 * (matrices_active + config.vocab_size * D) + 4 * q_width * config.context * L
    return Accounting(
        total=total_non_vocab + vocab,
        active=matrices_active + norms + vocab,
        total_non_vocab=total_non_vocab,
        active_non_vocab=matrices_active + norms,
        flops_forward=forward,
        flops_training=3 * forward,
    )


def _accounting_mlp(config: ModelConfig) -> Accounting:
    """That of a model of kind mlp: a record's FLOPs are spread over its tokens, rounded up."""
    D = config.d_model
    always = (config.context - 1) * D + config.num_experts * D
    expert, vocab = 2 * D * config.d_expert, config.vocab_size * D
    active = always + config.top_k * expert
    forward = -(-2 * (active + vocab) // config.context)
    return Accounting(
        total=always + config.num_experts * expert + vocab,
        active=active + vocab,
        total_non_vocab=always + config.num_experts * expert,
        active_non_vocab=active,
        flops_forward=forward,
        flops_training=3 * forward,
    )
