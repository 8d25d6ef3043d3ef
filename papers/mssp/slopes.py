"""Slopes of the classifier's coordinate check at any widths, sizes and seeds: what three seeds at the judged widths can tell.

- `after`: the coordinates of one model, trained in this process as an arm `check-*` trains it
- `slopes`: the slope of each term against the width, with its spread over seeds

No verdict comes from here: see "Why slopes differ" in README.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from papers.mssp.settings import Setting, grown
from repro.coordinates import coordinates
from repro.data import corpus
from repro.data.batches import Batches, evaluation_windows
from repro.mlp import make_model
from repro.model import ModelConfig
from repro.parameterization import Regime, Rule, parameterize
from repro.stats import slope
from repro.train import Mechanism, make_optimizer, training_step


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
    first, now = make_model(config, seed), make_model(config, seed)
    text = corpus.load("classification")
    train = setting.check
    batches = Batches(data=text.train, batch=train.batch, context=train.context, seed=seed)
    optimizer = make_optimizer(now, train)
    for step in range(steps):
        training_step(now, optimizer, train, *batches.at(step), Mechanism(), step, seed)
    held_out = evaluation_windows(text.held_out, tokens=setting.eval_tokens // 8, context=train.context)
    (layer,) = coordinates(first, now, *held_out)
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


def _spread(values: Sequence[float]) -> Slope:
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return Slope(n=len(values), mean=mean, sd=math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else math.nan)
