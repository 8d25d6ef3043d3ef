"""Slopes of the coordinate check at any sizes and seeds: what three seeds can tell, and why slopes are as they are.

- `after`: the coordinates of one classifier, trained in this process as an arm `check-*` trains it
- `slopes`: the slope of each term against the width, with its spread over seeds
- `depth_slopes`: the same of the transformer against its depth, as the arms `deep-check-*` are trained

No verdict comes from here: see "Why slopes differ" and "Learning rates at nano" in README.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from papers.mssp.settings import Setting, grown
from repro.coordinates import Coordinates, coordinates
from repro.data import corpus
from repro.data.batches import Batches, evaluation_windows
from repro.mlp import make_model
from repro.model import ModelConfig, Weight
from repro.parameterization import Regime, Rule, parameterize
from repro.stats import slope
from repro.train import Mechanism, TrainConfig, make_optimizer, training_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Slope:
    """Mean over `n` seeds of the slope of log2 RMS against log2 N, and its standard deviation (one seed: nan)."""

    n: int
    mean: float
    sd: float

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.sd / math.sqrt(self.n)


def after(
    steps: int, rule: Rule, regime: Regime, width: int, seed: int, *, setting: Setting, base: ModelConfig | None = None
) -> dict[str, float]:
    """Terms of `repro.coordinates` by name after so many steps; `base`: other sizes at the base than the setting's."""
    base = base or setting.mlp[regime]
    config = parameterize(grown(base, regime, width), rule, regime=regime, base=base)
    (layer,) = _trained(config, setting.check, "classification", steps, seed, setting.eval_tokens // 8)
    return {term: value for term, value in asdict(layer).items() if value}


def slopes(
    rule: Rule,
    regime: Regime,
    *,
    setting: Setting,
    seeds: Sequence[int],
    widths: Sequence[int] = (),
    steps: int = 2,
    **sizes: int,
) -> Mapping[str, Slope]:
    """Of each term that every model has; `widths`: the setting's by default.

    Args:
        sizes: of the base model, where they are not the setting's: d_expert, num_experts, top_k.
    """
    widths = widths or setting.widths[regime]
    base = replace(setting.mlp[regime], **sizes)  # type: ignore[arg-type]
    found = [
        [after(steps, rule, regime, width, seed, setting=setting, base=base) for width in widths] for seed in seeds
    ]
    terms = set.intersection(*(set(terms) for row in found for terms in row))
    return {term: _spread([slope(widths, [terms[term] for terms in row]) for row in found]) for term in sorted(terms)}


def depth_slopes(
    *,
    setting: Setting,
    seeds: Sequence[int],
    completep: bool = True,
    embedding: float = 1.0,
    layer: int | None = None,
    steps: int = 2,
) -> Mapping[str, Slope]:
    """Of each term, of MSSP in regime III, against log2 of the number of layers that `setting.sweep` names.

    Args:
        completep: anchored at the fewest layers; without, each depth is a base of its own.
        embedding: multiplies the embeddings' initial std.
        layer: of this layer's MoE; None: the root of the mean square over all layers, as is judged.
    """
    depths = setting.sweep.layers
    base = replace(setting.sweep.base["III"], num_layers=depths[0])
    train = replace(setting.text_check, batch=4, context=base.context)
    found = []
    for seed in seeds:
        row = []
        for depth in depths:
            model = replace(base, num_layers=depth)
            config = parameterize(model, "mssp", regime="III", base=base if completep else model)
            kept = [weight for weight in config.weights if weight.name != "embedding_VD"]
            (drawn,) = [weight for weight in config.weights if weight.name == "embedding_VD"] or [
                Weight(name="embedding_VD")
            ]
            config = replace(config, weights=(*kept, replace(drawn, std=drawn.std * embedding)))
            layers = _trained(config, train, setting.text_corpus, steps, seed, setting.eval_tokens // 8)
            row.append([asdict(one) for one in (layers if layer is None else [layers[layer]])])
        found.append(row)
    terms = [term for term in found[0][0][0] if all(one[term] for row in found for layers in row for one in layers)]
    return {
        term: _spread([slope(depths, [_rms([one[term] for one in layers]) for layers in row]) for row in found])
        for term in terms
    }


def _trained(
    config: ModelConfig, train: TrainConfig, name: str, steps: int, seed: int, tokens: int
) -> list[Coordinates]:
    """Coordinates of each MoE layer after so many steps."""
    first, now = make_model(config, seed), make_model(config, seed)
    text = corpus.load(name)
    batches = Batches(data=text.train, batch=train.batch, context=train.context, seed=seed)
    optimizer = make_optimizer(now, train)
    for step in range(steps):
        training_step(now, optimizer, train, *batches.at(step), Mechanism(), step, seed)
    return coordinates(first, now, *evaluation_windows(text.held_out, tokens=tokens, context=train.context))


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value**2 for value in values) / len(values))


def _spread(values: Sequence[float]) -> Slope:
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return Slope(n=len(values), mean=mean, sd=math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else math.nan)
