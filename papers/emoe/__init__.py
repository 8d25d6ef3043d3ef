"""Elastic MoE: Unlocking the Inference-Time Scalability of Mixture-of-Experts (arXiv 2509.21892v2).

The paper's observation: an MoE trained with k experts a token gets worse, not better, when more than k are used at
inference (the wall). Its remedy, EMoE, trains pairs of experts together that top-k would seldom pair, at the same cost
(`sampling.py`), and adds a loss that sharpens the router. Inference is plain top-k' (`inference.py`: what is measured).

The paper leaves open: λ of that loss; whether the pool's size is drawn a token, a layer or a step (here a token; the
others are arms); whether gates are normalised over the sampled experts (here they are; `raw` arms are those without).
See README.md for all deviations, and `scales.py` for sizes.

From scratch: `topk`, `emoe`, the same with raw gates, `control` (EMoE with k_ideal = k_train, which must be top-k bit for
bit) and `direct` (trained with 2k experts in as many steps as cost the same).

Post-training of a top-k model on other text, the paper's protocol, all `post-`: `topk`, `sampling` (λ = 0), `full` (λ > 0),
`emoe` (the best of both), `hr` (the router loss alone), `fixed` (the router stays that of top-k), `fixed-topk` (the same
without sampling), `control`, `direct`, `direct-tokens` (2k experts at equal FLOPs and at equal tokens), `layer`, `step`
(granularity of the draw), `pool` (always the largest pool), `random` (another k in each step).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from papers.emoe.inference import measure
from papers.emoe.sampling import CoActivation, ElasticTraining, RandomK, hierarchical_router_loss, mechanism
from papers.emoe.scales import LAMBDAS, SETTINGS, Scratch, Setting
from repro.accounting import accounting
from repro.experiment import Arm, Curve, Design, Figure, Group
from repro.model import ModelConfig
from repro.pretrained import Pretrained
from repro.train import Segment, TrainConfig

__all__ = [
    "SETTINGS",
    "CoActivation",
    "ElasticTraining",
    "RandomK",
    "design",
    "hierarchical_router_loss",
    "measure",
    "mechanism",
]

ALPHAS = (0.1, 0.25, 0.5)  # of the ranks beyond k: the public tests' range, α ≤ .5


def design(scale: str, checkpoint: Pretrained | None = None) -> Design:
    """Arms, groups and figures at `scale`; with a public `checkpoint`, the arms that train it further and no others.

    `base` and `paper` have those alone, with or without a checkpoint at hand.
    """
    setting = SETTINGS[scale]
    if checkpoint:
        setting = _starting_from(setting, checkpoint)
    groups = _post(setting)
    if setting.scratch and not setting.post.checkpoint:
        groups = _scratch(setting, setting.scratch) | groups
    arms = {arm.id: arm for among in groups.values() for arm in among}
    return Design(
        seeds=setting.seeds,
        first_seed=setting.first_seed,
        arms=tuple(arms.values()),
        groups=tuple(groups),
        figures=_figures(setting),
    )


def _starting_from(setting: Setting, checkpoint: Pretrained) -> Setting:
    """The setting with the checkpoint's model in the place of its own, sampled from up to four times its experts a token."""
    model = replace(checkpoint.model, context=setting.post.train.context)
    post = replace(setting.post, checkpoint=checkpoint.digest)
    return replace(setting, model=model, k_ideal=min(4 * model.top_k, model.num_experts), post=post)


Groups = dict[Group, tuple[Arm, ...]]


def _group(name: str, label: str, *arms: Arm) -> Groups:
    return {Group(id=name, label=label, among=tuple(arm.id for arm in arms), by="tuning/loss"): arms}


def _scratch(setting: Setting, stage: Scratch) -> Groups:
    """Arms from random weights."""
    rates, ks = stage.learning_rates, setting.ks
    found: Groups = {}
    control = _arm(setting, "control", lr=rates[0], k_ideal=ks["1k"])
    for gate, note in (("", ""), ("-raw", ", raw gates")):
        model = replace(setting.model, renormalize=not gate)
        top_k = [_arm(setting, f"topk{gate}", model=model, lr=lr, rivals=not gate) for lr in rates]
        emoe = [_arm(setting, f"emoe{gate}", model=model, lr=lr, lambda_hr=LAMBDAS[0]) for lr in rates]
        if not gate:
            emoe.append(_arm(setting, "emoe", lr=rates[-1], lambda_hr=0.0))
            found |= _group("topk-ref", "top-k, the control's twin", top_k[0])
        found |= _group(f"topk{gate}", f"top-k{note}", *top_k)
        found |= _group(f"emoe{gate}", f"EMoE{note}", *emoe)
    double = replace(setting.model, top_k=ks["2k"])
    train = _same_flops(stage.train, setting.model, double)
    direct = [_arm(setting, "direct", model=double, train=train, lr=lr) for lr in rates]
    found |= _group("direct", f"top-{ks['2k']} trained at equal FLOPs", *direct)
    return found | _group("control", "EMoE with k_ideal = k", control)


def _post(setting: Setting) -> Groups:
    """Arms that go on with a pretrained top-k model on other text."""
    rates, ks, k = setting.post.learning_rates, setting.ks, setting.model.top_k
    last = rates[-1]
    double = replace(setting.model, top_k=ks["2k"])
    shorter = _same_flops(setting.post.train, setting.model, double)

    def arm(kind: str, *, lr: float = last, **options: Any) -> Arm:
        return _arm(setting, f"post-{kind}", lr=lr, post=True, **options)

    top_k = [arm("topk", lr=lr, rivals=True, probed=True) for lr in rates]
    sampling = [arm("sampling", lr=lr, lambda_hr=0.0, probed=True) for lr in rates]
    full = [arm("full", lambda_hr=value, probed=True) for value in LAMBDAS]
    return (
        _group("post-topk", "top-k", *top_k)
        | _group("post-topk-ref", "top-k, the variants' twin", top_k[-1])
        | _group("post-sampling", "sampling alone", *sampling)
        | _group("post-sampling-ref", "sampling alone, the variants' twin", sampling[-1])
        | _group("post-full", "sampling and router loss", *full)
        | _group("post-emoe", "EMoE", *sampling, *full)
        | _group("post-hr", "router loss alone", *(arm("hr", k_ideal=k, lambda_hr=value) for value in LAMBDAS))
        | _group("post-fixed", "sampling, the router fixed", arm("fixed", lambda_hr=0.0, freeze=("router_ED",)))
        | _group("post-fixed-topk", "top-k, the router fixed", arm("fixed-topk", freeze=("router_ED",)))
        | _group("post-control", "EMoE with k_ideal = k", arm("control", k_ideal=k, probed=True))
        | _group(
            "post-direct",
            f"top-{ks['2k']} trained at equal FLOPs",
            arm("direct", model=double, train=shorter),
        )
        | _group(
            "post-direct-tokens",
            f"top-{ks['2k']} trained at equal tokens",
            arm("direct-tokens", model=double),
        )
        | _group("post-layer", "pool drawn a layer", arm("layer", lambda_hr=0.0, draw="layer"))
        | _group("post-step", "pool drawn a step", arm("step", lambda_hr=0.0, draw="step"))
        | _group("post-pool", "always the largest pool", arm("pool", lambda_hr=0.0, draw="never"))
        | _group("post-random", "another k in each step", arm("random", k_most=setting.k_ideal))
    )


def _same_flops(train: TrainConfig, model: ModelConfig, double: ModelConfig) -> TrainConfig:
    """`train` with as many steps of `double` as cost what its own steps of `model` do, in whole trace groups."""
    ratio = accounting(model).flops_training / accounting(double).flops_training
    return replace(train, steps=int(train.steps * ratio) // train.trace_every * train.trace_every)


def _arm(
    setting: Setting,
    kind: str,
    *,
    lr: float,
    model: ModelConfig | None = None,
    train: TrainConfig | None = None,
    post: bool = False,
    lambda_hr: float | None = None,
    k_ideal: int | None = None,
    draw: str | None = None,
    k_most: int | None = None,
    freeze: tuple[str, ...] = (),
    rivals: bool = False,
    probed: bool = False,
) -> Arm:
    """One arm: co-activation sampling where `lambda_hr` or `k_ideal` is given, random k with `k_most`, else top-k.

    `rivals` measures the rules that avoid dilution, `probed` the router's calibration and the oracle.
    """
    model = model or setting.model
    stage = setting.post if post else setting.scratch
    assert stage
    data: Mapping[str, Any] = {}
    if k_most:
        data = {"k_most": k_most, "renormalize": model.renormalize}
    elif lambda_hr is not None or k_ideal:
        data = {
            "k_train": model.top_k,
            "k_ideal": k_ideal or setting.k_ideal,
            "renormalize": model.renormalize,
            "lambda_hr": lambda_hr or 0.0,
        } | ({"draw": draw} if draw else {})
    segment = Segment(
        model=model,
        train=replace(train or stage.train, lr=lr),
        corpus=stage.corpus,
        mechanism=data,
        inherit="weights" if post and not setting.post.checkpoint else "nothing",
        freeze=freeze,
        checkpoint=setting.post.checkpoint if post else None,
    )
    ks = setting.ks
    options: dict[str, Any] = {"ks": ks, "tokens": setting.eval_tokens}
    forwards = setting.eval_tokens * (len(ks) + 1)
    if rivals:
        options["alphas"] = ALPHAS
        forwards += setting.eval_tokens * (len(ALPHAS) + 2 * sum(k > ks["1k"] for k in ks.values()))
    if probed:
        options |= {"calibrated": setting.post.calibrated, "stride": setting.post.stride}
        options |= {"hindsight": setting.post.hindsight, "pool": setting.k_ideal}
        context, layers = model.context, model.moe_layers
        forwards += setting.post.calibrated * context * (1 + layers * ks["2k"])
        forwards += setting.post.hindsight * context * layers * setting.k_ideal * (ks["1k"] + ks["2k"])
    named = f"-l{lambda_hr:g}" if lambda_hr is not None and not (draw or freeze) else ""
    return Arm(
        id=f"{kind}-lr{lr:g}{named}",
        label=f"{kind}, learning rate {lr:g}"
        + (f", λ {lambda_hr:g}" if named else "")
        + ("" if model.renormalize else ", raw gates"),
        segments=(*(_pretraining(setting) if post else ()), segment),
        measure=options,
        measure_tokens=forwards,
    )


def _pretraining(setting: Setting) -> tuple[Segment, ...]:
    """What post-training starts from: the arm `topk` at one learning rate, trained once for all, if not a checkpoint."""
    if setting.post.checkpoint or not setting.scratch:
        return ()
    train = replace(setting.scratch.train, lr=setting.post.pretrained_at)
    return (Segment(model=setting.model, train=train, corpus=setting.scratch.corpus),)


def _figures(setting: Setting) -> tuple[Figure, ...]:
    """Loss against k': from scratch, with raw gates, against rival rules; post-trained, and there what varies one thing."""
    ks = setting.ks
    beyond = {name: "loss" if k <= ks["1k"] else "rival" for name, k in ks.items()}

    def figure(title: str, *curves: Curve) -> Figure:
        return Figure(
            title=f"{title}, trained with k = {ks['1k']}",
            x_label="experts used a token at inference, k'",
            y_label="held-out loss, nats/byte",
            x=tuple(float(k) for k in ks.values()),
            curves=curves,
        )

    def curves(*arms: str) -> tuple[Curve, ...]:
        return tuple(Curve(arm=arm, metrics=tuple(f"loss/{name}" for name in ks)) for arm in arms)

    def rival(arm: str, rule: str, name: str) -> Curve:
        metrics = tuple(f"{beyond[k].replace('rival', rule)}/{k}" for k in ks)
        return Curve(arm=name, arms=(arm,) * len(ks), metrics=metrics)

    return (
        figure("Loss against experts used", *curves("topk", "emoe", "direct")),
        figure("Raw gates", *curves("topk-raw", "emoe-raw")),
        figure(
            "Without diluting the gates",
            *curves("topk", "emoe"),
            rival("topk", "scaled", "top-k, extra ranks scaled"),
            rival("topk", "anchored", "top-k, anchored denominator"),
        ),
        figure(
            "Post-trained on other text", *curves("post-topk", "post-emoe", "post-direct", "post-fixed", "post-random")
        ),
        figure("Parts of EMoE, post-trained", *curves("post-topk", "post-sampling", "post-full", "post-hr")),
        figure(
            "Choices left open, post-trained",
            *curves("post-topk-ref", "post-sampling-ref", "post-layer", "post-step", "post-pool"),
        ),
    )
