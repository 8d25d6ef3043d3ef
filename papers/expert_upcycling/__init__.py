"""Expert Upcycling: Shifting the Compute-Efficient Frontier of Mixture-of-Experts (arXiv 2604.19835v2).

The paper's operator U_m: train a model of E experts, copy expert e r_e times so that there are mE, copy its router row to each
replica, add U(−δ, δ) to the router biases of the replicas alone, reset the optimizer, and go on training (CPT) with loss-free
balancing; top-K stays. Copies are dealt out evenly or to the experts of the highest utility. It says that this closes nearly all
of the gap to a model that had mE experts from the start.

- `scales.py`: the settings of each scale; `arms.py`: the two stages as segments; `twins.py`: whether duplicates specialise;
  `contest.py`: the table against EMO; here: the recipe, the mechanism, arms and figures, measures

Arms: `fixed-e`, `fixed-me` (no growth), `up` (uniform), `utility`, `random`, `sparse` (from a dense model), perturbations of `up`
(`exact`, `noise`, `rows`), the controls `tied` and `last`; suffix `-10` … `-75`: CPT of so many percent of the PT's steps, `-200`
of twice as many; `before`, `start`, `random-start`: at the transition itself, `k…` with other K; the suite `sweeps`: `at…` other
transitions, `pool…` other E at the same K; the suite `contest`. See README.md for deviations.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from papers.expert_upcycling import contest, twins
from papers.expert_upcycling.arms import Family, Setting, Step, at_once, continued, line, pretraining
from papers.expert_upcycling.recipes import RANDOM, UPCYCLING, UTILITY
from papers.expert_upcycling.scales import SETTINGS
from records.errors import UsageError
from repro.data.batches import evaluation_windows
from repro.data.corpus import Bytes
from repro.evals.held_out import held_out_loss
from repro.experiment import Arm, Curve, Design, Figure
from repro.model import ModelOutput, Transformer
from repro.train import Mechanism

CPT = {"-10": 0.1, "-25": 0.25, "-50": 0.5, "-75": 0.75, "": 1.0, "-200": 2.0}  # suffix: CPT in steps of the PT
TRANSITIONS = {"05": 0.05, "13": 0.13, "25": 0.25, "38": 0.38, "75": 0.75}  # of T, beside the half
SCORES = ("weight", "weight_grad", "grad2_per_curvature", "least_grad2")  # beside the default, grad2
PERTURBED = {
    "exact": ("no disturbed biases", replace(UPCYCLING, bias_noise=0.0)),
    "noise": ("copies with weight noise of 1%", replace(UPCYCLING, weight_noise=0.01)),
    "rows": ("copies with router rows drawn anew", replace(UPCYCLING, router="random")),
}


class Duplicates(Mechanism):
    """Watches twins for the trace; with `tied` keeps them equal, so that the grown pool holds no more than the small one."""

    def __init__(self, *, tied: bool = False) -> None:
        self._tied = tied

    def gradients(self, model: Transformer) -> None:
        if self._tied:
            twins.tie(model)

    def probe(self, model: Transformer, output: ModelOutput) -> Mapping[str, float]:
        if not twins.grown_layers(model):
            return {}
        names = list(model.lineages)
        together = {
            name: twins.chosen_together(router.routing) for name, router in zip(names, output.routers, strict=True)
        }
        return twins.flat(
            cosine=twins.weight_likeness(model),
            gradient=twins.gradient_likeness(model),
            overlap=twins.overlap_likeness(model, together),
        )


def mechanism(config: Mapping[str, Any]) -> Mechanism:
    """Watches twins; `{"tied": true}` for the control."""
    return Duplicates(**config)


def design(scale: str) -> Design:
    """Arms and figures at `scale`.

    Raises:
        UsageError: a scale that is not set up for this paper.
    """
    if scale not in SETTINGS:
        raise UsageError(f"expert-upcycling at scale {scale!r} is not set up: expected one of {', '.join(SETTINGS)}")
    setting = SETTINGS[scale]
    return Design(
        seeds=setting.seeds,
        arms=(*_main(setting), *_at_the_transition(setting), *_sweeps(setting), *contest.arms(setting)),
        figures=(*_figures(), *contest.figures()),
    )


def _ends(setting: Setting, *suffixes: str) -> dict[str, int]:
    return {suffix: setting.part(CPT[suffix] / 2) for suffix in suffixes}


def _main(setting: Setting) -> Iterator[Arm]:
    """Arms whose transition is at half; those of one first stage share it."""
    half, (small, large) = setting.half, setting.models()
    marks = tuple(setting.part(share) for share in TRANSITIONS.values())
    before = pretraining(setting, small, half, marks)
    alone = _ends(setting, "")
    yield from line(setting, "fixed-e", "E throughout", before, small, _ends(setting, *CPT), Step())
    whole = pretraining(setting, large, half)
    yield from line(setting, "fixed-me", "mE throughout", whole, large, _ends(setting, *CPT), Step())
    grown = Step(growth=UPCYCLING)
    yield from line(setting, "up", "upcycled", before, large, _ends(setting, *CPT), grown, diagnose=True)
    useful = Step(growth=UTILITY)
    yield from line(
        setting, "utility", "upcycled by ‖g‖²", before, large, _ends(setting, "", "-25"), useful, diagnose=True
    )
    for score in SCORES:
        growth = replace(UTILITY, score=score)  # type: ignore[arg-type]
        name = score.replace("_", "-")
        yield from line(
            setting, name, f"upcycled by {score}", before, large, _ends(setting, "-25"), Step(growth=growth)
        )
    yield from line(setting, "random", "random new experts", before, large, alone, Step(growth=RANDOM))
    for name, (label, growth) in PERTURBED.items():
        yield from line(setting, name, label, before, large, alone, Step(growth=growth))
    tied = Step(growth=UPCYCLING, mechanism={"tied": True})
    yield from line(setting, "tied", "twins tied", before, large, alone, tied, diagnose=True)
    ended = [*before, *continued(setting, small, half, half, Step(), tuple(_ends(setting, *CPT).values()))]
    yield setting.arm("last", "upcycled after the last step", at_once(setting, ended, large, UPCYCLING))
    # A gate over one expert, renormalised, is 1: with one expert the model is dense.
    dense = pretraining(setting, replace(small, num_experts=1, top_k=1), half)
    sparse = Step(growth=replace(UPCYCLING, router="random"))
    yield from line(setting, "sparse", "sparse upcycling of a dense model", dense, large, alone, sparse)
    yield setting.arm("before", "before the transition", before)
    yield setting.arm("start", "just upcycled", at_once(setting, before, large, UPCYCLING))
    yield setting.arm("random-start", "just given random experts", at_once(setting, before, large, RANDOM))


def _at_the_transition(setting: Setting) -> Iterator[Arm]:
    """Before and after the transition at other K, after a quarter of T."""
    for k in setting.ks:
        small, large = setting.models(Family(few=setting.k_pool, many=2 * setting.k_pool, top_k=k))
        before = pretraining(setting, small, setting.part(0.25))
        yield setting.arm(f"k{k}-before", f"K = {k}, before the transition", before)
        yield setting.arm(f"k{k}-start", f"K = {k}, just upcycled", at_once(setting, before, large, UPCYCLING))


def _sweeps(setting: Setting) -> Iterator[Arm]:
    """Other transitions at the same total, and other pools at the same K."""
    half, (small, large) = setting.half, setting.models()
    marks = tuple(setting.part(share) for share in TRANSITIONS.values())
    grown = Step(growth=UPCYCLING)
    for name, share in TRANSITIONS.items():
        begin = setting.part(share)
        before = pretraining(setting, small, begin, marks)
        rest = {"": 2 * half - begin}
        yield from line(setting, f"at{name}", f"upcycled at {name}% of T", before, large, rest, grown)
    for number, experts in enumerate(setting.pools, start=1):
        few, many = setting.models(Family(few=experts, many=2 * experts, top_k=setting.model.top_k))
        ends = _ends(setting, "")
        before = pretraining(setting, few, half)
        whole = pretraining(setting, many, half)
        yield from line(setting, f"pool{number}-fixed-e", "E throughout", before, few, ends, Step())
        yield from line(setting, f"pool{number}-fixed-me", "mE throughout", whole, many, ends, Step())
        yield from line(setting, f"pool{number}-up", "upcycled", before, many, ends, grown)


def _figures() -> Iterator[Figure]:
    shown = ("fixed-e", "fixed-me", "up", "random")
    yield Figure(
        title="Training loss against tokens; marks show where a segment begins", x_label="tokens",
        y_label="training loss, nats/byte", curves=tuple(Curve(arm=arm) for arm in shown), kind="training",
    )  # fmt: skip
    yield Figure(
        title="Training loss against measured time", x_label="seconds", y_label="training loss, nats/byte",
        curves=tuple(Curve(arm=arm) for arm in shown[:3]), kind="time",
    )  # fmt: skip
    suffixes = tuple(CPT)

    def along(name: str, *arms: str) -> Curve:
        return Curve(arm=name, arms=arms, metrics=("loss",) * len(arms))

    yield Figure(
        title="Share of the gap from E to mE experts that upcycling closes (η), against continued pre-training",
        x_label="CPT, % of the pre-training's steps", y_label="η", x=tuple(100 * share for share in CPT.values()), kind="closure",
        base=along("E throughout", *(f"fixed-e{s}" for s in suffixes)),
        target=along("mE throughout", *(f"fixed-me{s}" for s in suffixes)),
        curves=(along("upcycled", *(f"up{s}" for s in suffixes)),),
    )  # fmt: skip
    yield Figure(
        title="Share of the gap that is closed (η), against when the pool grows, at equal tokens",
        x_label="transition, % of all steps", y_label="η", x=(5.0, 13.0, 25.0, 38.0, 50.0, 75.0), kind="closure",
        base=along("E throughout", *["fixed-e"] * 6), target=along("mE throughout", *["fixed-me"] * 6),
        curves=(along("upcycled", "at05", "at13", "at25", "at38", "up", "at75"),), suite="sweeps",
    )  # fmt: skip
    for what, name in (("weights", "cosine"), ("gradients", "gradient")):
        yield Figure(
            title=f"Cosine of the {what} of an expert and its copy (mean over pairs) during CPT", x_label="tokens",
            y_label="cosine", curves=tuple(Curve(arm=arm, metrics=(f"twins/{name}",)) for arm in ("up", "utility")),
            kind="probe",
        )  # fmt: skip
    yield Figure(
        title="Share of tokens that an expert and its copy have in common (mean over pairs) during CPT", x_label="tokens",
        y_label="overlap", curves=tuple(Curve(arm=arm, metrics=("twins/overlap",)) for arm in ("up", "utility")),
        kind="probe",
    )  # fmt: skip
    yield Figure(
        title="Load of each expert during CPT", x_label="tokens", y_label="expert", curves=(Curve(arm="up"),), kind="load",
    )  # fmt: skip


def measure(model: Transformer, config: Mapping[str, Any], held_out: Bytes) -> Iterator[tuple[str, float]]:
    """`loss` in nats/byte on held-out text; with `diagnose` what becomes of twins there (`twins.diagnose`)."""
    windows = evaluation_windows(held_out, tokens=config["tokens"], context=model.config.context)
    yield "loss", held_out_loss(model, *windows)
    if config["diagnose"]:
        yield from twins.diagnose(model, *windows).items()
