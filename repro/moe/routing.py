"""Routing as data: (token, expert, weight) triples in a stable order, and the rules that make them.

Nothing downstream knows how an expert was chosen, so k may differ by token, between training and inference, and by
rule; a slot may stay empty; and the number of experts may grow while a model is alive.

On a GPU nothing here scatters: where torch promises deterministic results it scatters by way of a sort, and looks at the indices
from the host, which waits for the device. What a scatter would do is done by sorts of our own, searches and gathers.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from repro.moe.errors import RoutingError

# From this k on, one stable sort costs less than k passes for the maximum.
_SORT_FROM_K = 12


@dataclass(frozen=True, slots=True)
class Routing:
    """Who computes what: N assignments of T tokens to E experts, token-major, in slot order within a token.

    `order_N` is the stable permutation from token-major to expert-major: `token_N[order_N]` lists the tokens of
    expert 0 in rising order, then those of expert 1. Both orders have CSR offsets: token t owns the assignments
    `by_token[t]:by_token[t + 1]`, expert e owns `order_N[by_expert[e]:by_expert[e + 1]]`.
    """

    token_N: Tensor  # int64
    expert_N: Tensor  # int64
    weight_N: Tensor  # floating, differentiable
    order_N: Tensor  # int64
    by_token: Tensor  # int64, T + 1
    by_expert: Tensor  # int64, E + 1
    num_experts: int

    @property
    def num_tokens(self) -> int:
        return self.by_token.numel() - 1

    @property
    def load_E(self) -> Tensor:
        """Assignments an expert received (int64)."""
        return self.by_expert.diff()

    @classmethod
    def from_slots(
        cls,
        expert_TK: Tensor,
        weight_TK: Tensor,
        num_experts: int,
        *,
        all_filled: bool | None = None,
        kernels: bool = False,
    ) -> "Routing":
        """Routing from K slots a token; an expert of -1 leaves its slot empty.

        `all_filled=True` promises that no slot is empty and spares the look, which on a GPU would wait for the device.
        `kernels` sorts by this package's own Triton kernels rather than by torch.
        Raises `RoutingError` for shapes that differ or an expert outside 0..num_experts-1 (seen on the CPU only).
        """
        if expert_TK.dim() != 2 or expert_TK.shape != weight_TK.shape:
            raise RoutingError(
                f"expected experts and weights of one shape (T, K), found {tuple(expert_TK.shape)} and "
                f"{tuple(weight_TK.shape)}; give each slot of each token one expert and one weight"
            )
        T, K = expert_TK.shape
        device = expert_TK.device
        expert_N = expert_TK.reshape(-1)
        weight_N = weight_TK.reshape(-1)
        if device.type == "cpu" and expert_N.numel():
            low, high = (int(bound) for bound in expert_N.aminmax())
            if low < -1 or high >= num_experts:
                found = low if low < -1 else high
                raise RoutingError(f"expected experts in 0..{num_experts - 1}, or -1 for an empty slot, found {found}")
            all_filled = low >= 0
        elif all_filled is None:
            all_filled = bool((expert_N >= 0).all())
        if all_filled:
            by_token = torch.arange(T + 1, device=device) * K
            token_N = torch.arange(T, device=device).repeat_interleave(K, output_size=T * K)
        else:
            filled_N = expert_N >= 0
            by_token = _offsets(filled_N.view(T, K).sum(1))
            token_N = torch.arange(T, device=device).repeat_interleave(K)[filled_N]
            expert_N, weight_N = expert_N[filled_N], weight_N[filled_N]
        if kernels:
            from repro.moe.triton_order import order_by_expert

            order_N, by_expert = order_by_expert(expert_N.contiguous(), num_experts)
        else:
            order_N, by_expert = by_sorting(expert_N, num_experts)
        return cls(
            token_N=token_N,
            expert_N=expert_N,
            weight_N=weight_N,
            order_N=order_N,
            by_token=by_token,
            by_expert=by_expert,
            num_experts=num_experts,
        )


class RoutingRule(Protocol):
    """How scores become assignments: the one hook for a new selection or gate.

    A rule is called once a layer, in the order of the layers, so it may carry random state or settings a layer. One that leaves
    no slot empty says so by an attribute `fills_all`, which is then True, and on a GPU spares each layer a wait for the device.
    """

    def __call__(self, scores_TE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """Experts (T, K) as int64, -1 for an empty slot, and their weights (T, K), differentiable in the scores.

        `bias_E`, if any, is the selection bias: it may sway which experts are chosen, not their weights.
        """
        ...


@dataclass(frozen=True, slots=True)
class TopK:
    """The k experts of highest score + bias, weighted by their scores, which are made to sum to 1 if `renormalize`.

    `k` is one number, or an int64 tensor with a k for every token; slots are in falling order of score. Ties go to the
    lowest expert index, so equal scores give equal routings on every device.
    """

    k: int | Tensor
    renormalize: bool = True

    @property
    def fills_all(self) -> bool | None:
        """Whether no slot is left empty; None where it is not known without a look."""
        return None if isinstance(self.k, Tensor) else True

    def __call__(self, scores_TE: Tensor, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
        T, E = scores_TE.shape
        if isinstance(self.k, Tensor):
            if self.k.shape != (T,):
                raise RoutingError(f"expected a k for each of {T} tokens, found shape {tuple(self.k.shape)}")
            widest, least = (int(self.k.max()), int(self.k.min())) if T else (0, 0)
        else:
            widest = least = self.k
        if least < 0 or widest > E:
            raise RoutingError(f"expected k in 0..{E}, the number of experts, found {widest if widest > E else least}")
        with torch.no_grad():
            expert_TK = stable_top_k(scores_TE if bias_E is None else scores_TE + bias_E, widest)
        weight_TK = scores_of(scores_TE, expert_TK)
        if isinstance(self.k, Tensor):
            empty_TK = torch.arange(widest, device=scores_TE.device) >= self.k[:, None]
            weight_TK = weight_TK.masked_fill(empty_TK, 0)
            expert_TK = expert_TK.masked_fill(empty_TK, -1)
        if self.renormalize:
            # The floor is far below any score that matters; it keeps a token whose scores all underflowed finite.
            tiny = torch.finfo(weight_TK.dtype).tiny
            weight_TK = weight_TK / weight_TK.sum(1, keepdim=True).clamp_min(tiny)
        return expert_TK, weight_TK


def stable_top_k(scores_TE: Tensor, k: int) -> Tensor:
    """Indices (T, k) of the k largest scores of each row, falling, ties to the lowest index (`torch.topk` leaves
    them open). At least k scores of a row must be above -inf.
    """
    if k >= _SORT_FROM_K:
        return torch.sort(scores_TE, dim=1, descending=True, stable=True).indices[:, :k]
    best: list[Tensor] = []
    left_TE = scores_TE.detach()
    for slot in range(k):
        if slot:
            left_TE = left_TE.scatter(1, best[-1], -torch.inf)
        # `max` is specified to return the index of the first of equal maxima.
        best.append(left_TE.max(1, keepdim=True).indices)
    return torch.cat(best, dim=1) if best else torch.empty_like(scores_TE[:, :0], dtype=torch.int64)


def scores_of(scores_TE: Tensor, expert_TK: Tensor) -> Tensor:
    """The scores (T, K) of the experts chosen, no expert twice for a token: a gather whose backward scatters nothing on a GPU."""
    if scores_TE.device.type == "cpu":
        return scores_TE.gather(1, expert_TK)
    chosen_TK: Tensor = _Chosen.apply(scores_TE, expert_TK)  # type: ignore[no-untyped-call]
    return chosen_TK


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores_TE: Tensor, expert_TK: Tensor) -> Tensor:
        ctx.save_for_backward(expert_TK)
        ctx.num_experts = scores_TE.shape[1]
        return scores_TE.gather(1, expert_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dchosen_TK,), (expert_TK,) = grads, ctx.saved_tensors
        expert_E = torch.arange(ctx.num_experts, device=expert_TK.device)
        dscores_TE = dchosen_TK.new_zeros(expert_TK.shape[0], ctx.num_experts)
        for slot in range(expert_TK.shape[1]):
            here = slice(slot, slot + 1)
            dscores_TE = torch.where(expert_TK[:, here] == expert_E, dchosen_TK[:, here], dscores_TE)
        return dscores_TE, None


@dataclass(frozen=True, slots=True)
class RouterOutput:
    """What one MoE layer's router said: logits, scores (softmax or sigmoid of them) and the routing made from them."""

    logits_TE: Tensor
    scores_TE: Tensor
    routing: Routing


def balance_loss(router: RouterOutput, group: dist.ProcessGroup | None = None) -> Tensor:
    """E·Σ_e f_e·p_e, a scalar: 1 when balanced, E when one expert takes all, for any k.

    f_e is the share of the assignments that expert e received and p_e its mean score, the scores of a token made to sum
    to 1 (softmax scores do already). The form of Switch Transformer (arXiv 2101.03961, eq. 4), with f over assignments
    rather than tokens so that k drops out. Zero where nothing was routed.

    With a process `group`, f counts the assignments of all its processes; the mean of their losses is then the loss of
    all their tokens at once.
    """
    scores_TE = router.scores_TE
    load_E = router.routing.load_E.to(scores_TE.dtype)
    if group is not None:
        dist.all_reduce(load_E, group=group)
    if scores_TE.shape[0] == 0:
        return scores_TE.sum()
    share_E = load_E * (router.routing.num_experts / load_E.sum().clamp_min(1))
    # The division by the token's sum comes after the sum over experts: nothing of size (T, E) is made.
    return ((scores_TE @ share_E) / scores_TE.sum(1).clamp_min(torch.finfo(scores_TE.dtype).tiny)).mean()


def _offsets(counts: Tensor) -> Tensor:
    """CSR offsets of counts: 0, then the running sum."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def by_sorting(expert_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The stable permutation (N) that sorts the assignments by expert, and the experts' CSR offsets (E + 1)."""
    if num_experts <= np.iinfo(np.int16).max:
        # Radix sorts take one pass a byte of the key.
        expert_N = expert_N.to(torch.int16)
    if expert_N.device.type == "cpu":
        # numpy sorts 16-bit integers by radix: 4 to 8 times faster than torch's comparison sort.
        order_N = torch.from_numpy(np.argsort(expert_N.numpy(), kind="stable"))
        return order_N, _offsets(torch.bincount(expert_N, minlength=num_experts))
    return sorted_on_device(expert_N, num_experts)


def sorted_on_device(expert_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The same with what waits for no device: `bincount` would, to learn its largest entry."""
    sorted_N, order_N = torch.sort(expert_N, stable=True)
    bound = torch.arange(num_experts + 1, device=expert_N.device, dtype=expert_N.dtype)
    return order_N, torch.searchsorted(sorted_N, bound)


def inverse(order_N: Tensor) -> Tensor:
    """Where each entry of a permutation lies."""
    if order_N.device.type != "cpu":
        return order_N.to(torch.int32).argsort()  # half the passes that 64 bits take
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(order_N.numel())
    return place_N
