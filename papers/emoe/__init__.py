"""Elastic MoE: Unlocking the Inference-Time Scalability of Mixture-of-Experts (arXiv 2509.21892v2).

The paper's observation: an MoE trained with k experts a token gets worse, not better, when more than k are used at
inference (the wall). Its remedy, EMoE, trains pairs of experts together that top-k would seldom pair, at the same cost:

- `CoActivation`: stochastic co-activation sampling. Draw k̃ from {k_train … k_ideal}, take the k̃ best experts as a
  pool, run k_train of them drawn without replacement. Inference is plain top-k'.
- `hierarchical_router_loss`: L_HR = −KL(q‖U) = H(q) − log N of the router's softmax q a token, minimised with weight λ.

The paper leaves open: λ; whether k̃ is drawn a token, a layer or a step (here: a token); whether gates are normalised
over the sampled experts (here: both, `raw` arms are those without). See README.md for all deviations.

Arms: `topk` and `emoe`, each over the same grid of learning rates; EMoE also over λ. The pair is repeated with raw gates.
`control` is EMoE with k_ideal = k_train, which must be top-k bit for bit.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from records.errors import UsageError
from repro.data.batches import evaluation_windows
from repro.data.corpus import Bytes
from repro.evals.held_out import held_out_loss
from repro.experiment import Arm, Curve, Design, Figure, Group
from repro.model import ModelConfig, ModelOutput, Transformer
from repro.moe import RouterOutput, RoutingRule, TopK
from repro.moe.routing import stable_top_k
from repro.pretrained import Pretrained
from repro.seeds import derive
from repro.train import Mechanism, Segment, TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class CoActivation:
    """Routing rule of a training step: `k_train` experts drawn from the token's k̃ best, k̃ uniform in k_train … k_ideal.

    Slots stay in falling order of score, so that with k_ideal = k_train the routing is that of `TopK`, bit for bit.
    """

    k_train: int
    k_ideal: int
    renormalize: bool
    generator: torch.Generator

    def __call__(self, scores_TE: Tensor, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Experts (T, k_train) and weights, differentiable in the scores."""
        T, P = scores_TE.shape[0], self.k_ideal
        with torch.no_grad():
            pool_TP = stable_top_k(scores_TE if bias_E is None else scores_TE + bias_E, P)
            device = self.generator.device
            size_T1 = torch.randint(self.k_train, P + 1, (T, 1), generator=self.generator, device=device)
            draw_TP = torch.rand(T, P, generator=self.generator, device=device)
            draw_TP = draw_TP.masked_fill(torch.arange(P, device=device) >= size_T1, 2.0)  # outside the pool: last
            rank_TK = draw_TP.argsort(dim=1, stable=True)[:, : self.k_train].sort(dim=1).values
            expert_TK = pool_TP.gather(1, rank_TK.to(pool_TP.device))
        weight_TK = scores_TE.gather(1, expert_TK)
        if self.renormalize:
            weight_TK = weight_TK / weight_TK.sum(1, keepdim=True).clamp_min(torch.finfo(weight_TK.dtype).tiny)
        return expert_TK, weight_TK


def hierarchical_router_loss(router: RouterOutput) -> Tensor:
    """L_HR = H(q) − log N in nats, averaged over tokens: 0 for a uniform router, −log N for one that is certain."""
    log_q_TE = router.logits_TE.log_softmax(1)
    entropy_T = -(log_q_TE.exp() * log_q_TE).sum(1)
    return entropy_T.mean() - torch.log(torch.tensor(float(log_q_TE.shape[1])))


class ElasticTraining(Mechanism):
    """Co-activation sampling in training, and λ·L_HR averaged over layers."""

    def __init__(self, *, k_train: int, k_ideal: int, renormalize: bool, lambda_hr: float) -> None:
        if not 1 <= k_train <= k_ideal:
            raise UsageError(f"EMoE: expected 1 ≤ k_train ≤ k_ideal, found {k_train}, {k_ideal}")
        self.k_train, self.k_ideal, self.renormalize, self.lambda_hr = k_train, k_ideal, renormalize, lambda_hr

    def rule(self, step: int, seed: int) -> RoutingRule:
        generator = torch.Generator().manual_seed(derive(seed, "co-activation", step))
        return CoActivation(
            k_train=self.k_train, k_ideal=self.k_ideal, renormalize=self.renormalize, generator=generator
        )

    def loss(self, output: ModelOutput) -> Tensor | None:
        if not self.lambda_hr:
            return None
        return self.lambda_hr * torch.stack([hierarchical_router_loss(router) for router in output.routers]).mean()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a scale fixes for all arms. `ks` are the k' measured: 1, k, 1.5k, 2k, 3k, 4k.

    λ is tried at the last of the learning rates, the control runs at the first.
    """

    model: ModelConfig
    train: TrainConfig
    corpus: str
    seeds: int
    learning_rates: tuple[float, ...]
    k_ideal: int
    eval_tokens: int
    checkpoint: str | None = None

    @property
    def ks(self) -> tuple[int, ...]:
        k, experts = self.model.top_k, self.model.num_experts
        return tuple(sorted({1, k, 3 * k // 2, 2 * k, 3 * k, 4 * k} & set(range(1, experts + 1))))


def _model(
    *, d: int, f: int, layers: int, heads: int, experts: int, k: int, context: int, vocab: int = 256
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab, d_model=d, d_expert=f, num_layers=layers, num_heads=heads, num_experts=experts, top_k=k,
        context=context,
    )  # fmt: skip


SETTINGS = {
    "smoke": Setting(
        model=_model(d=16, f=8, layers=1, heads=2, experts=8, k=2, context=32),
        train=TrainConfig(
            steps=20, batch=4, context=32, lr=3e-3, warmup=4, trace_every=5, hash_every=10, checkpoint_every=10
        ),
        corpus="synthetic",
        seeds=2,
        learning_rates=(3e-3,),
        k_ideal=8,
        eval_tokens=2_048,
    ),
    "nano": Setting(
        model=_model(d=64, f=32, layers=2, heads=4, experts=16, k=2, context=128),
        train=TrainConfig(steps=1_200, batch=8, context=128, lr=3e-3, warmup=40),
        corpus="stdlib",
        seeds=3,
        learning_rates=(3e-3, 6e-3),  # 1.5e-3 and 1.2e-2 lost in the pilot; see README.md
        k_ideal=8,
        eval_tokens=65_536,
    ),
}

LAMBDAS = (0.0, 0.001, 0.01)
LAMBDA = 0.001  # for the arms that vary something else


def mechanism(config: Mapping[str, Any]) -> Mechanism:
    """The mechanism that a segment's data describe: none (top-k), or `emoe` with its parameters."""
    if not config:
        return Mechanism()
    return ElasticTraining(
        k_train=config["k_train"],
        k_ideal=config["k_ideal"],
        renormalize=config["renormalize"],
        lambda_hr=float(config["lambda_hr"]),
    )


def design(scale: str, checkpoint: Pretrained | None = None) -> Design:
    """Arms, groups and figure at `scale`; with a `checkpoint` its model is trained further in every arm.

    Raises:
        UsageError: a scale that is not set up for this paper.
    """
    if scale not in SETTINGS:
        raise UsageError(f"emoe at scale {scale!r} is not set up yet: expected one of {', '.join(SETTINGS)}")
    setting = SETTINGS[scale] if checkpoint is None else _post_training(SETTINGS[scale], checkpoint)
    arms: list[Arm] = []
    groups: list[Group] = []
    for gate in ("", "-raw"):
        top_k = [_arm(setting, "topk", gate, lr=lr) for lr in setting.learning_rates]
        emoe = [_arm(setting, "emoe", gate, lr=lr, lambda_hr=LAMBDA) for lr in setting.learning_rates]
        if not gate:
            last = setting.learning_rates[-1]
            emoe += [_arm(setting, "emoe", gate, lr=last, lambda_hr=value) for value in LAMBDAS if value != LAMBDA]
        arms += top_k + emoe
        note = ", raw gates" if gate else ""
        groups += [
            Group(id=f"topk{gate}", label=f"top-k{note}", among=tuple(a.id for a in top_k), by="tuning/loss"),
            Group(id=f"emoe{gate}", label=f"EMoE{note}", among=tuple(a.id for a in emoe), by="tuning/loss"),
        ]
    arms.append(_arm(setting, "control", "", lr=setting.learning_rates[0], k_ideal=setting.model.top_k))
    metrics = tuple(f"loss/k={k}" for k in setting.ks)
    k_train = setting.model.top_k
    figure = Figure(
        title=f"Held-out loss against the number of experts used at inference, trained with k = {k_train}",
        x_label="experts used a token at inference, k'",
        y_label="held-out loss, nats/byte",
        x=tuple(float(k) for k in setting.ks),
        curves=tuple(Curve(arm=group.id, metrics=metrics) for group in groups),
    )
    return Design(seeds=setting.seeds, arms=tuple(arms), groups=tuple(groups), figures=(figure,))


def _post_training(setting: Setting, checkpoint: Pretrained) -> Setting:
    """The setting with the checkpoint's model in the place of its own, sampled from up to four times its experts a token."""
    model = replace(checkpoint.model, context=setting.train.context)
    return replace(setting, model=model, k_ideal=min(4 * model.top_k, model.num_experts), checkpoint=checkpoint.digest)


def _arm(
    setting: Setting, kind: str, gate: str, *, lr: float, lambda_hr: float = 0.0, k_ideal: int | None = None
) -> Arm:
    """One arm: `kind` topk trains as the model's config says, any other with co-activation sampling."""
    model = replace(setting.model, renormalize=not gate)
    parts, data = [f"{kind}{gate}", f"lr{lr:g}"], {}
    if kind != "topk":
        data = {
            "k_train": model.top_k,
            "k_ideal": k_ideal or setting.k_ideal,
            "renormalize": model.renormalize,
            "lambda_hr": lambda_hr,
        }
        parts += [f"l{lambda_hr:g}"] if kind == "emoe" else []
    segment = Segment(
        model=model,
        train=replace(setting.train, lr=lr),
        corpus=setting.corpus,
        mechanism=data,
        checkpoint=setting.checkpoint,
    )
    return Arm(
        id="-".join(parts),
        label=f"{kind}, learning rate {lr:g}"
        + (f", λ {lambda_hr:g}" if kind == "emoe" else "")
        + (", raw gates" if gate else ""),
        segments=(segment,),
        measure={"ks": setting.ks, "tokens": setting.eval_tokens},
        measure_tokens=setting.eval_tokens * (len(setting.ks) + 1),
    )


def measure(model: Transformer, config: Mapping[str, Any], held_out: Bytes) -> Iterator[tuple[str, float]]:
    """`tuning/loss` on one half of the held-out windows, `loss/k=K'` on the other half, in nats/byte.

    Learning rates and λ are chosen on the first, at the k of training; claims are judged on the second.
    """
    context = model.config.context
    tokens_WS, targets_WS = evaluation_windows(held_out, tokens=2 * config["tokens"], context=context)
    yield "tuning/loss", held_out_loss(model, tokens_WS[0::2], targets_WS[0::2])
    for k in config["ks"]:
        rule = TopK(k, renormalize=model.config.renormalize)
        yield f"loss/k={k}", held_out_loss(model, tokens_WS[1::2], targets_WS[1::2], rule)
