"""What EMoE changes in training: which experts are run, and a loss on the router.

- `CoActivation`: draw k̃ from {k_train … k_ideal}, take the k̃ best experts as a pool, run k_train of them at random
- `hierarchical_router_loss`: L_HR = −KL(q‖U) = H(q) − log N of the router's softmax q a token
- `ElasticTraining`: both, as the mechanism of a training segment
- `RandomK`: the rival that trains with another number of experts in each step
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from records.errors import UsageError
from repro.model import ModelOutput
from repro.moe import RouterOutput, RoutingRule, TopK
from repro.moe.routing import scores_of, stable_top_k
from repro.seeds import derive
from repro.train import Mechanism

Draw = Literal["token", "layer", "step", "never"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CoActivation:
    """Routing rule of a training step: `k_train` experts drawn from the token's k̃ best, k̃ uniform in k_train … k_ideal.

    k̃ is drawn anew for every token, or for every layer, or is the number that `size` gives. Slots stay in falling order
    of score, so that with k_ideal = k_train the routing is that of `TopK`, bit for bit.
    """

    k_train: int
    k_ideal: int
    renormalize: bool
    generator: torch.Generator
    size: Literal["token", "layer"] | int = "token"
    fills_all: ClassVar[bool] = True

    def __call__(self, scores_TE: Tensor, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Experts (T, k_train) and weights, differentiable in the scores."""
        T, P = scores_TE.shape[0], self.k_ideal
        with torch.no_grad():
            pool_TP = stable_top_k(scores_TE if bias_E is None else scores_TE + bias_E, P)
            device = self.generator.device
            if isinstance(self.size, int):
                size_T1 = torch.full((1, 1), self.size, device=device)
            else:
                drawn = T if self.size == "token" else 1
                size_T1 = torch.randint(self.k_train, P + 1, (drawn, 1), generator=self.generator, device=device)
            draw_TP = torch.rand(T, P, generator=self.generator, device=device)
            draw_TP = draw_TP.masked_fill(torch.arange(P, device=device) >= size_T1, 2.0)  # outside the pool: last
            rank_TK = draw_TP.argsort(dim=1, stable=True)[:, : self.k_train].sort(dim=1).values
            expert_TK = pool_TP.gather(1, rank_TK.to(pool_TP.device))
        weight_TK = scores_of(scores_TE, expert_TK)
        if self.renormalize:
            weight_TK = weight_TK / weight_TK.sum(1, keepdim=True).clamp_min(torch.finfo(weight_TK.dtype).tiny)
        return expert_TK, weight_TK


def hierarchical_router_loss(router: RouterOutput) -> Tensor:
    """L_HR = H(q) − log N in nats, averaged over tokens: 0 for a uniform router, −log N for one that is certain."""
    log_q_TE = router.logits_TE.log_softmax(1)
    entropy_T = -(log_q_TE.exp() * log_q_TE).sum(1)
    return entropy_T.mean() - torch.log(torch.tensor(float(log_q_TE.shape[1])))


class ElasticTraining(Mechanism):
    """Co-activation sampling in training, and λ·L_HR averaged over layers.

    `draw` says how often k̃ is drawn anew; `never` keeps it at k_ideal (a fixed pool).
    """

    def __init__(
        self, *, k_train: int, k_ideal: int, renormalize: bool, lambda_hr: float, draw: Draw = "token"
    ) -> None:
        if not 1 <= k_train <= k_ideal:
            raise UsageError(f"EMoE: expected 1 ≤ k_train ≤ k_ideal, found {k_train}, {k_ideal}")
        self.k_train, self.k_ideal, self.renormalize, self.lambda_hr = k_train, k_ideal, renormalize, lambda_hr
        self.draw = draw

    def rule(self, step: int, seed: int) -> RoutingRule:
        generator = torch.Generator().manual_seed(derive(seed, "co-activation", step))
        size: Literal["token", "layer"] | int
        if self.draw == "step":
            size = int(torch.randint(self.k_train, self.k_ideal + 1, (), generator=generator))
        else:
            size = self.k_ideal if self.draw == "never" else self.draw
        return CoActivation(
            k_train=self.k_train, k_ideal=self.k_ideal, renormalize=self.renormalize, generator=generator, size=size
        )

    def loss(self, output: ModelOutput) -> Tensor | None:
        if not self.lambda_hr:
            return None
        return self.lambda_hr * torch.stack([hierarchical_router_loss(router) for router in output.routers]).mean()


class RandomK(Mechanism):
    """Top-k with k drawn uniformly from 1 … k_most for each step: one model for all k, as Matryoshka training does it."""

    def __init__(self, *, k_most: int, renormalize: bool) -> None:
        self.k_most, self.renormalize = k_most, renormalize

    def rule(self, step: int, seed: int) -> RoutingRule:
        generator = torch.Generator().manual_seed(derive(seed, "random-k", step))
        return TopK(int(torch.randint(1, self.k_most + 1, (), generator=generator)), self.renormalize)


def mechanism(config: Mapping[str, Any]) -> Mechanism:
    """The mechanism that a segment's data describe: none (top-k), random k, or EMoE with its parameters."""
    if not config:
        return Mechanism()
    if "k_most" in config:
        return RandomK(**config)
    return ElasticTraining(**{**config, "lambda_hr": float(config["lambda_hr"])})
