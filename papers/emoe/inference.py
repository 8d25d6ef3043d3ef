"""What is measured on a trained model: its loss at every k', rival ways to use more experts, and what its router knows.

- `ScaledTail`, `Anchored`: rules that use k' experts without diluting the k best; nothing is trained for them
- `leave_one_out`: the utility of each chosen expert, by running the model without it
- `calibration`: rank correlation of the router's scores with these utilities
- `oracle_losses`: the loss with experts chosen by hindsight
- `measure`: all of it, as a paper's measures
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from repro.accounting import accounting
from repro.data.batches import evaluation_windows
from repro.data.corpus import Bytes
from repro.evals.held_out import held_out_loss
from repro.model import Transformer
from repro.moe import RoutingRule, TopK
from repro.moe.routing import stable_top_k
from repro.seeds import derive

_WINDOWS_AT_ONCE = 32


def normalized(weight_TK: Tensor) -> Tensor:
    """Weights made to sum to 1 a token."""
    return weight_TK / weight_TK.sum(1, keepdim=True).clamp_min(torch.finfo(weight_TK.dtype).tiny)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledTail:
    """Top-k whose ranks beyond `k_train` weigh `alpha` times their score, before the weights are made to sum to 1."""

    k: int
    k_train: int
    alpha: float
    renormalize: bool

    def __call__(self, scores_TE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """Experts (T, k) and weights."""
        expert_TK, weight_TK = TopK(self.k, renormalize=False)(scores_TE, bias_E)
        scale_K = torch.ones(self.k, dtype=weight_TK.dtype, device=weight_TK.device)
        scale_K[self.k_train :] = self.alpha
        weight_TK = weight_TK * scale_K
        return expert_TK, normalized(weight_TK) if self.renormalize else weight_TK


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchored:
    """Top-k divided by the sum of the `k_train` best scores, as in training: more experts leave those weights alone."""

    k: int
    k_train: int
    renormalize: bool

    def __call__(self, scores_TE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """Experts (T, k) and weights."""
        expert_TK, weight_TK = TopK(self.k, renormalize=False)(scores_TE, bias_E)
        if self.renormalize:
            anchor_T1 = weight_TK[:, : self.k_train].sum(1, keepdim=True)
            weight_TK = weight_TK / anchor_T1.clamp_min(torch.finfo(weight_TK.dtype).tiny)
        return expert_TK, weight_TK


class LeaveOut:
    """Top-k in every layer, but in `layer` the changed tokens go without their expert of rank `rank`.

    Good for one forward pass: it counts the layers.
    """

    def __init__(self, *, k: int, renormalize: bool, layer: int, rank: int, changed_T: Tensor) -> None:
        self._top_k, self._renormalize, self._layer, self._rank = TopK(k, renormalize=False), renormalize, layer, rank
        self._changed_T, self._layers = changed_T, itertools.count()

    def __call__(self, scores_TE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """Experts (T, k), -1 for the one left out, and weights."""
        expert_TK, weight_TK = self._top_k(scores_TE, bias_E)
        if next(self._layers) == self._layer:
            out_TK = torch.zeros_like(expert_TK, dtype=torch.bool)
            out_TK[:, self._rank] = self._changed_T
            expert_TK, weight_TK = expert_TK.masked_fill(out_TK, -1), weight_TK.masked_fill(out_TK, 0)
        return expert_TK, normalized(weight_TK) if self._renormalize else weight_TK


class Chosen:
    """Top-k, but in the layers of `ranks` the experts whose ranks (T, K) by score are given. Good for one forward pass."""

    def __init__(self, *, k: int, renormalize: bool, ranks: Mapping[int, Tensor]) -> None:
        self._top_k, self._renormalize, self._ranks = TopK(k, renormalize), renormalize, ranks
        self._layers = itertools.count()

    def __call__(self, scores_TE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """Experts (T, K) and weights."""
        rank_TK = self._ranks.get(next(self._layers))
        if rank_TK is None:
            return self._top_k(scores_TE, bias_E)
        pool_TP = stable_top_k(scores_TE if bias_E is None else scores_TE + bias_E, int(rank_TK.max()) + 1)
        expert_TK = pool_TP.gather(1, rank_TK)
        weight_TK = scores_TE.gather(1, expert_TK)
        return expert_TK, normalized(weight_TK) if self._renormalize else weight_TK


def _batches(tokens_WS: Tensor, targets_WS: Tensor, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for first in range(0, len(tokens_WS), _WINDOWS_AT_ONCE):
        part = slice(first, first + _WINDOWS_AT_ONCE)
        yield tokens_WS[part].to(device), targets_WS[part].to(device)


def _losses_T(model: Transformer, tokens_BS: Tensor, targets_BS: Tensor, rule: RoutingRule) -> Tensor:
    logits_BSV = model(tokens_BS, rule=rule).logits_BSV
    return torch.nn.functional.cross_entropy(
        logits_BSV.float().flatten(0, 1), targets_BS.flatten(), reduction="none"
    ).double()


@torch.no_grad()
def leave_one_out(
    model: Transformer, tokens_WS: Tensor, targets_WS: Tensor, *, k: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Scores and utilities (N, L, k) of the k chosen experts of N tokens in each of the L MoE layers.

    An expert's utility is by how much the loss of the token's own next byte (nats) rises when the token goes without it in
    that layer, the gates of the others renormalised as the model does. One token in `stride` is changed at a time, so that
    it hardly matters that the tokens before it, which it attends to, go without theirs.
    """
    model.eval()
    device, renormalize = next(model.parameters()).device, model.config.renormalize
    scores: list[Tensor] = []
    utilities: list[Tensor] = []
    for tokens_BS, targets_BS in _batches(tokens_WS, targets_WS, device):
        B, S = tokens_BS.shape
        place_BS = torch.arange(S, device=device) + torch.arange(B, device=device)[:, None]
        changed_T = (place_BS % stride == 0).flatten()
        whole = model(tokens_BS, rule=TopK(k, renormalize))
        whole_T = torch.nn.functional.cross_entropy(
            whole.logits_BSV.float().flatten(0, 1), targets_BS.flatten(), reduction="none"
        ).double()
        rows = []
        for layer in range(len(whole.routers)):
            for rank in range(k):
                rule = LeaveOut(k=k, renormalize=renormalize, layer=layer, rank=rank, changed_T=changed_T)
                rows.append((_losses_T(model, tokens_BS, targets_BS, rule) - whole_T)[changed_T])
        utilities.append(torch.stack(rows, dim=1).view(-1, len(whole.routers), k).cpu())
        layers = [router.routing.expert_N.view(-1, k) for router in whole.routers]
        pairs = zip(whole.routers, layers, strict=True)
        scores.append(
            torch.stack([router.scores_TE.gather(1, expert_TK)[changed_T] for router, expert_TK in pairs], dim=1).cpu()
        )
    return torch.cat(scores), torch.cat(utilities)


def rank_correlation(a_NK: Tensor, b_NK: Tensor) -> Tensor:
    """Spearman's ρ of each row (N,), ties sharing their mean rank; 0 for a row that is constant in either."""
    ranks = [torch.from_numpy(stats.rankdata(x.double().numpy(), axis=1)) for x in (a_NK, b_NK)]
    a, b = (rank - rank.mean(1, keepdim=True) for rank in ranks)
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt().clamp_min(1e-12)


def calibration(score_NLK: Tensor, utility_NLK: Tensor) -> Iterator[tuple[str, float]]:
    """Metrics of how well scores foretell utilities:

    `calibration/token`     Spearman's ρ over a token's chosen experts, mean over tokens and layers
    `calibration/shuffled`  the same with each token's scores in random order: what no knowledge gives
    `calibration/pooled`    Spearman's ρ over all (token, expert) pairs of a layer, mean over layers
    `utility/harmful`       share of the chosen experts without which the loss falls
    `utility/last`          mean utility of the lower half of the ranks, nats
    """
    K = score_NLK.shape[2]
    score_NK, utility_NK = score_NLK.flatten(0, 1), utility_NLK.flatten(0, 1)
    yield "calibration/token", float(rank_correlation(score_NK, utility_NK).mean())
    generator = torch.Generator().manual_seed(derive(0, "calibration", len(score_NK)))
    order_NK = torch.rand(score_NK.shape, generator=generator).argsort(1)
    yield "calibration/shuffled", float(rank_correlation(score_NK.gather(1, order_NK), utility_NK).mean())
    pooled = [
        float(stats.spearmanr(score_NLK[:, layer].flatten().numpy(), utility_NLK[:, layer].flatten().numpy()).statistic)
        for layer in range(score_NLK.shape[1])
    ]
    yield "calibration/pooled", math.fsum(pooled) / len(pooled)
    yield "utility/harmful", float((utility_NK < 0).double().mean())
    yield "utility/last", float(utility_NK[:, K // 2 :].mean())


@torch.no_grad()
def oracle_losses(model: Transformer, tokens_WS: Tensor, targets_WS: Tensor, *, k: int, pool: int) -> float:
    """Loss (nats/byte) with k experts a token and layer chosen by hindsight out of the `pool` best by score.

    Greedy: layer by layer, each expert the one that lowers the loss of the token's own next byte most, given those before
    it and top-k in the layers above; all tokens at once. So it bounds from above what the best choice would reach.
    """
    model.eval()
    device, renormalize = next(model.parameters()).device, model.config.renormalize
    sums = []
    for tokens_BS, targets_BS in _batches(tokens_WS, targets_WS, device):
        ranks: dict[int, Tensor] = {}
        for layer in range(model.config.moe_layers):
            chosen_TK = torch.empty(tokens_BS.numel(), 0, dtype=torch.int64, device=device)
            for _ in range(k):
                tried = []
                for rank in range(pool):
                    with_rank_TK = torch.cat([chosen_TK, torch.full((len(chosen_TK), 1), rank, device=device)], dim=1)
                    rule = Chosen(k=k, renormalize=renormalize, ranks=ranks | {layer: with_rank_TK})
                    loss_T = _losses_T(model, tokens_BS, targets_BS, rule)
                    tried.append(loss_T.masked_fill((chosen_TK == rank).any(1), math.inf))
                best_T1 = torch.stack(tried, dim=1).argmin(1, keepdim=True)
                chosen_TK = torch.cat([chosen_TK, best_T1], dim=1)
            ranks[layer] = chosen_TK
        rule = Chosen(k=k, renormalize=renormalize, ranks=ranks)
        sums.append(float(_losses_T(model, tokens_BS, targets_BS, rule).sum()))
    return math.fsum(sums) / targets_WS.numel()


def measure(model: Transformer, config: Mapping[str, Any], held_out: Bytes) -> Iterator[tuple[str, float]]:
    """Metrics, in nats/byte where no other unit is named. Names hold k' as a multiple of the k of training (`2k`):

    `tuning/loss`               on one half of the held-out windows, at the model's own k: settings are chosen by it
    `loss/…`, `flops/…`         on the other half, and what a token costs there (FLOPs, forward)
    `scaled/…`, `anchored/…`    the same with `ScaledTail` and `Anchored`; `scaled/alpha` is chosen on the first half
    `calibration/…`, `utility/…`, `oracle/…`   at 2k, and of hindsight at 1k too, on the first windows of the other half
    """
    # in the order of k', not of the mapping: a plan read from its file has its keys sorted
    renormalize, ks = model.config.renormalize, dict(sorted(config["ks"].items(), key=lambda item: item[1]))
    tokens_WS, targets_WS = evaluation_windows(held_out, tokens=2 * config["tokens"], context=model.config.context)
    tuning, judged = (tokens_WS[0::2], targets_WS[0::2]), (tokens_WS[1::2], targets_WS[1::2])
    yield "tuning/loss", held_out_loss(model, *tuning)
    for name, k in ks.items():
        yield f"loss/{name}", held_out_loss(model, *judged, TopK(k, renormalize))
        yield f"flops/{name}", float(accounting(replace(model.config, top_k=k)).flops_forward)
    if alphas := [float(alpha) for alpha in config.get("alphas", ())]:
        yield from _rivals(model, ks, alphas, tuning, judged)
    if config.get("calibrated"):
        part = slice(config["calibrated"])
        pairs = leave_one_out(model, judged[0][part], judged[1][part], k=ks["2k"], stride=config["stride"])
        yield from calibration(*pairs)
    if config.get("hindsight"):
        part = slice(config["hindsight"])
        for name in ("1k", "2k"):
            loss = oracle_losses(model, judged[0][part], judged[1][part], k=ks[name], pool=config["pool"])
            yield f"oracle/{name}", loss


Windows = tuple[Tensor, Tensor]


def _rivals(
    model: Transformer, ks: Mapping[str, int], alphas: Sequence[float], tuning: Windows, judged: Windows
) -> Iterator[tuple[str, float]]:
    """`ScaledTail` at the alpha that is best at 2k on `tuning`, and `Anchored`, at every k' beyond k."""
    k_train, renormalize = ks["1k"], model.config.renormalize

    def scaled(k: int, alpha: float) -> RoutingRule:
        return ScaledTail(k=k, k_train=k_train, alpha=alpha, renormalize=renormalize)

    losses = {alpha: held_out_loss(model, *tuning, scaled(ks["2k"], alpha)) for alpha in alphas}
    best = min(losses, key=lambda alpha: (losses[alpha], alpha))
    yield "scaled/alpha", best
    for name, k in ks.items():
        if k > k_train:
            yield f"scaled/{name}", held_out_loss(model, *judged, scaled(k, best))
            anchored = Anchored(k=k, k_train=k_train, renormalize=renormalize)
            yield f"anchored/{name}", held_out_loss(model, *judged, anchored)
