"""What each scale fixes: sizes, steps, and the pools of the sweeps.

`base` is the paper's smallest rung and `small` the same model on text that one GPU reads in minutes; `paper` is its headline run,
of which only pools, tokens and the rounded parameter counts are known: the sizes are chosen here to come near those.
"""

from typing import Any

from papers.expert_upcycling.arms import Setting
from repro.model import ModelConfig
from repro.train import TrainConfig

BASE_TEXT = "data:pretraining"  # what `repro data prepare` made of web text, with a tokenizer of at most 50,304 entries


def _model(**sizes: Any) -> ModelConfig:
    return ModelConfig(score="sigmoid", selection_bias=True, **sizes)


def _train(**settings: Any) -> TrainConfig:
    """Loss-free balancing alone keeps the load even, and each stage anneals over its last tenth."""
    return TrainConfig(**({"decay": 0.1, "balance": 0.0, "bias_rate": 1e-3, "epochs": 1} | settings))


SETTINGS = {
    "smoke": Setting(
        model=_model(d_model=16, d_expert=8, num_layers=1, num_heads=2, num_experts=8, top_k=2, context=32),
        train=_train(
            steps=40, batch=4, context=32, lr=3e-3, warmup=2, trace_every=2, hash_every=10, checkpoint_every=10
        ),
        few=4, rewarm=2, corpus="synthetic", seeds=2, eval_tokens=2_048, probe=4, ks=(1, 2, 8), k_pool=8,
        pools=(2, 4, 8, 16), contest_steps=20,
    ),
    "nano": Setting(
        model=_model(d_model=64, d_expert=32, num_layers=2, num_heads=4, num_experts=16, top_k=2, context=128),
        train=_train(steps=1_200, batch=8, context=128, lr=3e-3, warmup=40),
        few=8, rewarm=20, corpus="stdlib", seeds=3, eval_tokens=131_072, probe=20, ks=(1, 2, 8), k_pool=16,
        pools=(4, 8, 16, 32), contest_steps=600,
    ),
    "small": Setting(
        model=_model(d_model=256, d_expert=384, num_layers=4, num_heads=4, num_experts=512, top_k=8, context=512),
        train=_train(steps=900, batch=16, context=512, lr=3e-3, warmup=40),
        few=256, rewarm=20, corpus="stdlib", seeds=3, eval_tokens=524_288, probe=50, ks=(1, 2, 8), k_pool=256,
        pools=(32, 64, 128, 256), contest_steps=900,
    ),
    "base": Setting(
        model=_model(
            d_model=256, d_expert=384, num_layers=4, num_heads=4, num_experts=512, top_k=8, context=8_192,
            vocab_size=50_304,
        ),
        train=_train(steps=16_790, batch=16, context=8_192, lr=1.69e-2, warmup=500, precision="bfloat16"),
        few=256, rewarm=200, corpus=BASE_TEXT, seeds=3, eval_tokens=524_288, probe=500, ks=(1, 2, 8), k_pool=256,
        pools=(32, 64, 128, 256), contest_steps=16_790,
    ),
    "paper": Setting(
        model=_model(
            d_model=2_048, d_expert=1_152, num_layers=24, num_heads=16, num_experts=64, top_k=2, context=8_192,
            vocab_size=50_304,
        ),
        train=_train(steps=90_600, batch=512, context=8_192, lr=4e-4, warmup=2_000, precision="bfloat16"),
        few=32, rewarm=500, corpus=BASE_TEXT, seeds=3, eval_tokens=1_048_576, probe=2_000, ks=(1, 2, 8), k_pool=32,
        pools=(4, 8, 16, 32), contest_steps=90_600,
    ),
}  # fmt: skip
