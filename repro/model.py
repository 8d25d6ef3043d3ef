"""The decoder-only transformer that all papers train.

- pre-norm blocks: RMSNorm, causal attention with rotary positions, RMSNorm, a SwiGLU feed-forward: MoE or dense
- the first `dense_layers` blocks are dense, and those in `dense_blocks`; with `num_experts=0` all are
- grouped queries, heads of another width, norms of queries and keys: what public checkpoints have
- `KeyValueCache`: generation token by token; training knows nothing of it
- untied or tied embeddings, no biases, no dropout
- `init_weights` draws each parameter, and each expert, from a stream of its own
- `Weight`: how one kind of weight departs from the defaults of initialisation and optimizer
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from records.errors import UsageError
from repro.moe import MoE, RouterOutput, RoutingRule, SwiGLU
from repro.moe.experts import check_backend
from repro.moe.layer import Score, check_score, check_sizes

EMBEDDING_STD = 0.02
QkNorm = Literal["none", "head", "width"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """How the weights called `name` (the last part, `router_ED`) depart from the defaults; see `repro.parameterization`.

    Factors on the initial std of `init_std` and on the optimizer's learning rate, ε and weight decay. `tied`: every
    expert starts as a copy of expert 0.
    """

    name: str
    std: float = 1.0
    lr: float = 1.0
    eps: float = 1.0
    decay: float = 1.0
    tied: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of a model. Raises `UsageError` (`RoutingError` for the MoE's sizes) if no such model can be.

    d_expert is the width of one expert, or of the whole feed-forward where `num_experts` is 0; d_shared that of the
    shared expert (0: none); d_dense that of the first `dense_layers` blocks and of those that `dense_blocks` lists.
    `context` is the longest sequence. d_head is the width of an attention head (0: d_model / num_heads); `num_kv_heads`
    heads of keys and values serve the queries' heads in groups (0: one each). `qk_norm` normalizes queries and keys before
    they are turned: each head by itself (Qwen3) or all heads as one vector (OLMoE).

    `kind` mlp is a classifier of fixed-length records instead, with one MoE layer and no attention (`repro.mlp`).
    `gate_scale` multiplies every expert's weight, `residual_scale` what each block adds to the stream. `weights` holds the
    departures from the defaults, by name.
    """

    vocab_size: int = 256
    d_model: int
    num_layers: int
    num_heads: int
    context: int
    d_expert: int
    num_experts: int
    top_k: int = 0
    score: Score = "softmax"
    renormalize: bool = True
    selection_bias: bool = False
    d_shared: int = 0
    dense_layers: int = 0
    d_dense: int = 0
    rope_theta: float = 10_000.0
    tie_embeddings: bool = False
    backend: str = "auto"
    d_head: int = 0
    num_kv_heads: int = 0
    qk_norm: QkNorm = "none"
    norm_eps: float = 1e-5
    dense_blocks: tuple[int, ...] = ()
    kind: Literal["transformer", "mlp"] = "transformer"
    gate_scale: float = 1.0
    residual_scale: float = 1.0
    weights: tuple[Weight, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "context", "d_expert"):
            if getattr(self, name) < 1:
                raise UsageError(f"model config: expected {name} of at least 1, found {getattr(self, name)}")
        if self.kind == "mlp" and (self.num_layers, self.num_heads, self.dense_layers) != (1, 1, 0):
            raise UsageError("model config: expected num_layers=1, num_heads=1 and dense_layers=0 with kind mlp")
        if self.kind == "mlp" and (not self.num_experts or self.context < 2 or self.d_shared or self.tie_embeddings):
            raise UsageError(
                "model config: expected experts, none of them shared, a context above 1 and untied embeddings with kind mlp"
            )
        if len({weight.name for weight in self.weights}) < len(self.weights):
            raise UsageError("model config: expected each name once in weights")
        if self.d_head < 0 or self.d_head % 2:
            raise UsageError(
                f"model config: expected d_head to be even (rotary positions turn pairs), found {self.d_head}"
            )
        if not self.d_head and self.d_model % (2 * self.num_heads):
            raise UsageError(
                f"model config: expected d_model to be a multiple of 2·num_heads = {2 * self.num_heads} "
                f"(rotary positions turn pairs), found {self.d_model}"
            )
        if self.num_kv_heads < 0 or (self.num_kv_heads and self.num_heads % self.num_kv_heads):
            raise UsageError(
                f"model config: expected num_kv_heads to divide num_heads = {self.num_heads}, found {self.num_kv_heads}"
            )
        if self.qk_norm not in get_args(QkNorm):
            raise UsageError(f"model config: expected qk_norm to be none, head or width, found {self.qk_norm!r}")
        if not 0 <= self.dense_layers <= self.num_layers:
            raise UsageError(f"model config: expected dense_layers in 0..{self.num_layers}, found {self.dense_layers}")
        if any(not 0 <= block < self.num_layers for block in self.dense_blocks):
            raise UsageError(
                f"model config: expected dense_blocks in 0..{self.num_layers - 1}, found {list(self.dense_blocks)}"
            )
        if (self.dense_layers or self.dense_blocks) and self.d_dense < 1:
            raise UsageError(f"model config: expected d_dense of at least 1 with dense_layers, found {self.d_dense}")
        for name in ("rope_theta", "norm_eps"):
            if getattr(self, name) <= 0:
                raise UsageError(f"model config: expected {name} above 0, found {getattr(self, name)}")
        check_score(self.score)
        check_backend(self.backend)
        if self.num_experts:
            check_sizes(
                d_model=self.d_model,
                d_expert=self.d_expert,
                num_experts=self.num_experts,
                top_k=self.top_k,
                d_shared=self.d_shared,
            )
        elif self.top_k or self.d_shared:
            raise UsageError(
                f"model config: expected top_k=0 and d_shared=0 in a dense model (num_experts=0), found "
                f"top_k={self.top_k}, d_shared={self.d_shared}"
            )

    def weight(self, name: str) -> Weight:
        """Departure of the parameter called `name`, in full or its last part alone."""
        leaf = name.rpartition(".")[2]
        return next((weight for weight in self.weights if weight.name == leaf), Weight(name=leaf))

    @property
    def moe_layers(self) -> int:
        """Number of blocks whose feed-forward is an MoE."""
        return sum(not self.is_dense(layer) for layer in range(self.num_layers))

    def is_dense(self, layer: int) -> bool:
        """Whether the feed-forward of block `layer` is dense."""
        return not self.num_experts or layer < self.dense_layers or layer in self.dense_blocks

    def dense_width(self, layer: int) -> int:
        """Width of the feed-forward of block `layer`, which is dense."""
        return self.d_dense if layer < self.dense_layers or layer in self.dense_blocks else self.d_expert

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.d_head or self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and of values."""
        return self.num_kv_heads or self.num_heads


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """Logits (B, S, V), and the router of each MoE layer in order."""

    logits_BSV: Tensor
    routers: tuple[RouterOutput, ...]


class KeyValueCache:
    """Keys and values of the tokens that a batch of sequences has seen, for `Transformer.forward` one after the other.

    Rows may be of different lengths: fill with right-padded prompts, then set `length_B` to their real lengths. What
    follows overwrites the padding, and no query looks beyond its own position.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        if capacity > config.context:
            raise UsageError(f"cache: expected a capacity of at most {config.context} (context), found {capacity}")
        shape = (config.num_layers, batch, config.kv_heads, capacity, config.head_width)
        self.k_LBHSC = torch.zeros(shape, device=device, dtype=dtype)
        self.v_LBHSC = torch.zeros(shape, device=device, dtype=dtype)
        self.length_B = torch.zeros(batch, dtype=torch.int64, device=device)

    def keep(self, row_R: Tensor) -> None:
        """Go on with these rows only."""
        self.k_LBHSC, self.v_LBHSC = self.k_LBHSC[:, row_R], self.v_LBHSC[:, row_R]
        self.length_B = self.length_B[row_R]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where new tokens go in one layer's part of a cache, and what each of them sees."""

    k_BHSC: Tensor
    v_BHSC: Tensor
    position_BS: Tensor
    seen_B1SS: Tensor

    def extend(self, k_BHSC: Tensor, v_BHSC: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values so far, with the new ones written in their place."""
        index = self.position_BS[:, None, :, None].expand_as(k_BHSC)
        return self.k_BHSC.scatter_(2, index, k_BHSC), self.v_BHSC.scatter_(2, index, v_BHSC)


class RMSNorm(nn.Module):
    """x / rms(x) · gain over the last axis."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.gain_D = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor
        if x.device.type == "cpu":
            y = _CpuRMSNorm.apply(x, self.gain_D, self.eps)  # type: ignore[no-untyped-call]
        else:
            y = nnf.rms_norm(x, [self.gain_D.numel()], self.gain_D, self.eps)
        return y


class _CpuRMSNorm(torch.autograd.Function):
    """torch has no fused kernel for this on the CPU; its composite backward takes twice as long as this one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, gain_D)
        return (x * scale).mul_(gain_D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, scale, gain_D = ctx.saved_tensors
        # Both sums below are of dy·x, weighted by scale over the tokens and by gain over the channels.
        product = (dy * x).view(-1, x.shape[-1])
        dgain_D = product.t() @ scale.view(-1) if ctx.needs_input_grad[1] else None
        along = (product @ gain_D).view_as(scale).mul_(scale.pow(3)).div_(x.shape[-1])
        return (dy * gain_D).mul_(scale).addcmul_(x, along, value=-1), dgain_D, None


class Attention(nn.Module):
    """Causal self-attention with rotary positions, queries' heads in groups; (B, S, D) to the same shape.

    `w_qkv_DD` is queries, keys and values side by side.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.kv_heads = config.num_heads, config.kv_heads
        self.widths = config.num_heads * config.head_width, config.kv_heads * config.head_width
        q_width, kv_width = self.widths
        self.w_qkv_DD = nn.Parameter(torch.empty(config.d_model, q_width + 2 * kv_width))
        self.w_out_DD = nn.Parameter(torch.empty(q_width, config.d_model))
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        self.norm_heads = config.qk_norm == "head"
        if config.qk_norm != "none":
            sizes = (config.head_width, config.head_width) if self.norm_heads else self.widths
            self.q_norm, self.k_norm = (RMSNorm(size, config.norm_eps) for size in sizes)

    def forward(self, x_BSD: Tensor, turn_SC: Tensor, place: _Place | None = None) -> Tensor:
        B, S, _ = x_BSD.shape
        q_width, kv_width = self.widths
        qk_BSD, v_BSD = torch.split(x_BSD @ self.w_qkv_DD, [q_width + kv_width, kv_width], dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q_BSD, k_BSD = torch.split(qk_BSD, [q_width, kv_width], dim=-1)
            qk_BSD = torch.cat([self._normed(q_BSD, self.q_norm), self._normed(k_BSD, self.k_norm)], dim=-1)
        q_BSD, k_BSD = torch.split(rotate(qk_BSD, turn_SC), [q_width, kv_width], dim=-1)
        q_BHSC = q_BSD.view(B, S, self.num_heads, -1).transpose(1, 2)
        k_BHSC, v_BHSC = (z.view(B, S, self.kv_heads, -1).transpose(1, 2) for z in (k_BSD, v_BSD))
        grouped = self.kv_heads != self.num_heads
        if place is None:
            y_BHSC = nnf.scaled_dot_product_attention(q_BHSC, k_BHSC, v_BHSC, is_causal=True, enable_gqa=grouped)
        else:
            k_BHSC, v_BHSC = place.extend(k_BHSC, v_BHSC)
            y_BHSC = nnf.scaled_dot_product_attention(
                q_BHSC, k_BHSC, v_BHSC, attn_mask=place.seen_B1SS, enable_gqa=grouped
            )
        return y_BHSC.transpose(1, 2).reshape(B, S, -1) @ self.w_out_DD

    def _normed(self, z_BSD: Tensor, norm: RMSNorm) -> Tensor:
        heads = (-1, norm.gain_D.numel()) if self.norm_heads else z_BSD.shape[-1:]
        y: Tensor = norm(z_BSD.reshape(*z_BSD.shape[:-1], *heads))
        return y.view_as(z_BSD)


def make_moe(config: ModelConfig, name: str) -> MoE:
    """The MoE layer of a config; its errors name it `name`."""
    layer = MoE(
        d_model=config.d_model,
        d_expert=config.d_expert,
        num_experts=config.num_experts,
        top_k=config.top_k,
        score=config.score,
        renormalize=config.renormalize,
        gate_scale=config.gate_scale,
        selection_bias=config.selection_bias,
        d_shared=config.d_shared,
        backend=config.backend,
    )
    layer.name = name
    return layer


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.residual_scale = config.residual_scale
        self.ffn: MoE | SwiGLU
        if config.is_dense(layer):
            self.ffn = SwiGLU(config.d_model, config.dense_width(layer))
        else:
            self.ffn = make_moe(config, f"blocks.{layer}.ffn")

    def forward(
        self, x_BSD: Tensor, turn_SC: Tensor, rule: RoutingRule | None, place: _Place | None = None
    ) -> tuple[Tensor, RouterOutput | None]:
        x_BSD = x_BSD + self._scaled(self.attention(self.attention_norm(x_BSD), turn_SC, place))
        if isinstance(self.ffn, SwiGLU):
            return x_BSD + self._scaled(self.ffn(self.ffn_norm(x_BSD))), None
        y_BSD, router = self.ffn.forward_with_router(self.ffn_norm(x_BSD), rule)
        return x_BSD + self._scaled(y_BSD), router

    def _scaled(self, y_BSD: Tensor) -> Tensor:
        return y_BSD if self.residual_scale == 1 else y_BSD * self.residual_scale


class Transformer(nn.Module):
    """The model of a config, its weights as `init_weights(seed)` draws them, or of any value where `seed` is None."""

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        # Where a grown pool's experts come from, by layer (`repro.moe.growth.grow`): of no weight's value, and not hashed.
        self.lineages: dict[str, Tensor] = {}
        self.embedding_VD = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.unembedding_VD = (
            self.embedding_VD if config.tie_embeddings else nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        )
        turn_SC = rotations(config.context, config.head_width, config.rope_theta)
        # Held as pairs of reals: `model.to(dtype)` would throw the imaginary part away.
        self.turn_SC2: Tensor
        self.register_buffer("turn_SC2", torch.view_as_real(turn_SC), persistent=False)
        if seed is not None:
            self.init_weights(seed)

    def forward(
        self, tokens_BS: Tensor, rule: RoutingRule | None = None, cache: KeyValueCache | None = None
    ) -> ModelOutput:
        """Next-token logits of int64 tokens; `rule`, if given, routes every MoE layer instead of the config's top-k.

        With a `cache` the tokens follow those that it holds, and are added to it.
        """
        config, length = self.config, tokens_BS.shape[1]
        if length > config.context:
            raise UsageError(f"model: expected at most {config.context} tokens a sequence (context), found {length}")
        routers = []
        x_BSD = nnf.embedding(tokens_BS, self.embedding_VD)
        # One angle a channel pair of every query and key head: long inner loops are several times faster on the CPU.
        heads = config.num_heads + config.kv_heads
        wide = torch.promote_types(self.turn_SC2.dtype, torch.float32)
        if cache is None:
            turn = torch.view_as_complex(self.turn_SC2[:length].to(wide)).repeat(1, heads)
        else:
            position_BS, seen_B1SS = _places(cache, length)
            turn = torch.view_as_complex(self.turn_SC2.to(wide))[position_BS].repeat(1, 1, heads)
        for layer, block in enumerate(self.blocks):
            place = None
            if cache is not None:
                place = _Place(cache.k_LBHSC[layer], cache.v_LBHSC[layer], position_BS, seen_B1SS)
            x_BSD, router = block(x_BSD, turn, rule, place)
            if router is not None:
                routers.append(router)
        if cache is not None:
            cache.length_B += length
        return ModelOutput(self.final_norm(x_BSD) @ self.unembedding_VD.t(), tuple(routers))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every weight from N(0, std²), each parameter from a stream of its own, derived from (seed, name).

        Expert tensors and router rows are drawn expert by expert from (seed, name, expert): models that differ in the
        number of experts share all other weights and their first experts bit for bit, which pairs their runs by seed.
        Values are drawn in float32 on the CPU and then moved, so they do not depend on the device. For the stds see
        `init_std`; the config's `weights` may scale them and tie the experts.
        """
        for name, parameter in self.named_parameters():
            std = init_std(name, self.config)
            if std is None:
                parameter.fill_(1)
            elif name.endswith(("_EDF", "_EFD", ".router_ED")):
                tied = self.config.weight(name).tied
                for expert, weight in enumerate(parameter):
                    weight.copy_(_draw(weight.shape, std, f"{seed}/{name}/{0 if tied else expert}"))
            else:
                parameter.copy_(_draw(parameter.shape, std, f"{seed}/{name}"))
        for name, buffer in self.named_buffers():
            if name.endswith("bias_E"):
                buffer.zero_()


def _places(cache: KeyValueCache, length: int) -> tuple[Tensor, Tensor]:
    """Positions (B, S) of the next `length` tokens, and which of the cache's positions each may see (B, 1, S, capacity)."""
    device, capacity = cache.length_B.device, cache.k_LBHSC.shape[3]
    position_BS = cache.length_B[:, None] + torch.arange(length, device=device)
    if int(position_BS.max()) >= capacity:
        raise UsageError(f"cache: expected at most {capacity} tokens a sequence, found {int(position_BS.max()) + 1}")
    seen_BSS = torch.arange(capacity, device=device) <= position_BS[:, :, None]
    return position_BS, seen_BSS[:, None]


def init_std(name: str, config: ModelConfig) -> float | None:
    """Std of a parameter's initial normal distribution; None for a norm's gain, which starts at 1.

    Matrices have std fan_in^-1/2, which keeps the RMS of activations at 1 at any width; those that write to the
    residual stream are divided by sqrt(2·num_layers), so that the stream's variance does not grow with depth (GPT-2's
    rule). The fan-in of an expert's down projection is its own width: k experts with weights summing to 1 add no more
    than one would. The logits of router and readout start at RMS 1 likewise. The embedding's scale does not matter to
    the blocks, which normalize it; GPT-2's 0.02 lets the first steps move it by its own size (at width 64, after 300
    steps, 0.04 nats better than width^-1/2 on either of two seeds, and equal after 1200). A tied readout shares it. The
    config's `weights` may hold a factor on each of these. A model of kind mlp has no residual stream to divide for.
    """
    std = _default_std(name, config)
    return None if std is None else std * config.weight(name).std


def _default_std(name: str, config: ModelConfig) -> float | None:
    leaf = name.rsplit(".", 1)[-1]
    residual = 1.0 if config.kind == "mlp" else (2 * config.num_layers) ** -0.5
    if leaf == "gain_D":
        return None
    if leaf == "embedding_VD":
        return EMBEDDING_STD
    if leaf == "w_in_ID":
        return float((config.context - 1) ** -0.5)
    if leaf in ("w_qkv_DD", "w_up_DF", "w_up_EDF", "router_ED", "unembedding_VD"):
        return float(config.d_model**-0.5)
    if leaf == "w_out_DD":
        return float((config.num_heads * config.head_width) ** -0.5 * residual)
    if leaf == "w_down_EFD":
        return float(config.d_expert**-0.5 * residual)
    if leaf == "w_down_FD":
        width = config.d_shared if ".shared." in name else config.dense_width(int(name.split(".")[1]))
        return float(width**-0.5 * residual)
    raise AssertionError(f"no initial std for {name}")


def _draw(shape: torch.Size, std: float, stream: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "big", signed=True)
    return torch.empty(shape).normal_(0, std, generator=torch.Generator().manual_seed(seed))


def rotations(length: int, width: int, theta: float) -> Tensor:
    """exp(i·position·theta^(-2c/width)), complex (S, width/2): rotary positions (arXiv 2104.09864, eq. 15)."""
    rate_C = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle_SC = torch.arange(length, dtype=torch.float64)[:, None] * rate_C
    return torch.polar(torch.ones_like(angle_SC), angle_SC).to(torch.complex64)


def rotate(x_BSD: Tensor, turn_SC: Tensor) -> Tensor:
    """Turn neighbouring channels (2c, 2c + 1) of each head by the position's angle; `turn_SC` covers all heads of x."""
    reals = torch.float64 if turn_SC.dtype == torch.complex128 else torch.float32
    pairs_BSC = torch.view_as_complex(x_BSD.to(reals).view(*x_BSD.shape[:-1], -1, 2))
    return torch.view_as_real(pairs_BSC * turn_SC).flatten(-2).to(x_BSD.dtype)
