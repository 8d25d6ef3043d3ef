"""Our model as lm-eval's: known answers, batches against one at a time, the cache against none, and every k'."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from records.errors import UsageError
from repro.data.tokens import Tokenizer
from repro.evals.lm import ModelLM
from repro.model import ModelConfig, Transformer
from repro.moe import TopK

CONFIG = ModelConfig(d_model=32, num_layers=2, num_heads=4, context=48, d_expert=16, num_experts=8, top_k=2)


def model(config: ModelConfig = CONFIG) -> Transformer:
    """A random model that is sure enough of itself for its choices not to hang on rounding."""
    made = Transformer(config)
    with torch.no_grad():
        made.unembedding_VD.mul_(3)
    return made


def requests(*arguments: tuple[object, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=item) for item in arguments]


def scores(net: Transformer, tokens: list[int], rule: TopK | None = None) -> torch.Tensor:
    return net(torch.tensor([tokens]), rule=rule).logits_BSV[0].double().log_softmax(-1)


PAIRS = [("The cat", " sat"), ("", "on the mat"), ("A much longer context than that one,", " ok"), ("x" * 100, "yz")]


@torch.no_grad()
@pytest.mark.parametrize("k", [None, 2, 5])
def test_log_likelihoods_are_those_of_the_model_one_by_one(k: int | None) -> None:
    net = model()
    lm = ModelLM(net, Tokenizer(), k=k)
    rule = TopK(k or 2)
    for (context, continuation), (value, greedy) in zip(PAIRS, lm.loglikelihood(requests(*PAIRS)), strict=True):
        tokens = list((context or "\0").encode()) + list(continuation.encode())
        tokens = tokens[-CONFIG.context - 1 :]
        count = len(continuation)
        given = scores(net, tokens[:-1], rule)[-count:]
        targets = torch.tensor(tokens[-count:])
        assert value == pytest.approx(float(given.gather(1, targets[:, None]).sum()), rel=1e-5)
        assert greedy == bool((given.argmax(-1) == targets).all())
    best = chr(int(scores(net, list(b"The cat"), rule)[-1].argmax()) & 127)
    assert lm.loglikelihood(requests(("The cat", best)))[0][1] == (best.encode()[0] == ord(best))


@torch.no_grad()
def test_a_uniform_byte_model_has_eight_bits_a_byte_and_windows_cover_every_byte_once() -> None:
    net = model()
    net.unembedding_VD.zero_()
    text = "Ünicode, and longer than any context. " * 9
    (value,) = ModelLM(net, Tokenizer()).loglikelihood_rolling(requests((text,)))
    assert -value / math.log(2) / len(text.encode()) == pytest.approx(8.0, abs=1e-12)


@torch.no_grad()
def test_rolling_gives_the_first_window_from_the_boundary_on() -> None:
    net = model()
    text = b"abcdefghij"
    tokens = [0, *text]
    expected = scores(net, tokens[:-1]).gather(1, torch.tensor(tokens[1:])[:, None]).sum()
    (value,) = ModelLM(net, Tokenizer()).loglikelihood_rolling(requests((text.decode(),)))
    assert value == pytest.approx(float(expected), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("k", [None, 6])
def test_generation_with_a_cache_is_greedy_decoding_without_one(k: int | None) -> None:
    net, prompts, new = model(), ["a", "the longest of the prompts", "and four", "zz top"], 12
    lm = ModelLM(net, Tokenizer(), k=k)
    expected = []
    for prompt in prompts:
        tokens = list(prompt.encode())
        for _ in range(new):
            best = int(scores(net, tokens, k and TopK(k))[-1].argmax())
            if best == 0:
                break
            tokens.append(best)
        expected.append(bytes(tokens[len(prompt) :]).decode(errors="replace"))
    settings = {"until": [], "max_gen_toks": new}
    assert lm.generate_until(requests(*((prompt, settings) for prompt in prompts))) == expected
    stop = expected[1][3:5]
    stopped = lm.generate_until(requests(*((prompt, {**settings, "until": [stop]}) for prompt in prompts)))
    assert stopped == [text.split(stop)[0] for text in expected]
    assert len(stopped[1]) <= 3


def test_what_it_cannot_do_is_said() -> None:
    net = model()
    with pytest.raises(UsageError, match="k: expected 1 to 8, the model's number of experts, found 9"):
        ModelLM(net, Tokenizer(), k=9)
    with pytest.raises(UsageError, match="at most the model's 64 tokens, found 256"):
        ModelLM(model(dataclasses.replace(CONFIG, vocab_size=64)), Tokenizer())
    with pytest.raises(UsageError, match="greedy only"):
        ModelLM(net, Tokenizer()).generate_until(requests(("x", {"do_sample": True})))
    with pytest.raises(UsageError, match="continuations of at most 48 tokens"):
        ModelLM(net, Tokenizer()).loglikelihood(requests(("x", "y" * 49)))
