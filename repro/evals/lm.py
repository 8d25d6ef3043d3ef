"""Our model as lm-eval's: log-likelihoods in batches, greedy generation with a cache, at any number of experts k'.

- `ModelLM`: the three kinds of request that tasks make
- contexts too long for the model lose their beginning, as is lm-eval's custom; a text longer than that is scored window by window
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from records.errors import UsageError
from repro.data.tokens import Tokenizer
from repro.model import KeyValueCache, Transformer
from repro.moe import TopK

_BATCH_TOKENS = 8_192
_NEW_TOKENS = 256
"""Tokens generated at most where a task does not say."""


class ModelLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """`model` with `tokenizer`; `k` experts a token in every MoE layer, None for the model's own.

    Raises:
        UsageError: a k that the model does not have, or a tokenizer of another vocabulary.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, k: int | None = None) -> None:
        super().__init__()
        config = model.config
        if config.kind != "transformer":
            raise UsageError(f"expected a language model, found a model of kind {config.kind}, which predicts no text")
        if k is not None and not 1 <= k <= config.num_experts:
            raise UsageError(f"k: expected 1 to {config.num_experts}, the model's number of experts, found {k}")
        if tokenizer.vocab_size > config.vocab_size:
            raise UsageError(
                f"expected a tokenizer of at most the model's {config.vocab_size} tokens, found {tokenizer.vocab_size}"
            )
        self.model, self.tokenizer = model.eval(), tokenizer
        self.rule = None if k is None else TopK(k, config.renormalize)
        self._device = model.embedding_VD.device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.boundary

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids; no special tokens are added."""
        ids: list[int] = self.tokenizer.encode([string.encode(errors="replace")])[0].tolist()
        return ids

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood (nats) of whole texts, each from the boundary token on."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            text = str(request.args[0])
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.model.config.context,
                context_len=1,
            ):
                context, continuation = make_disjoint_window(pair)
                windows.append((("", ""), context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        return totals

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation in nats, whether greedy decoding gives it), in the order of the requests."""
        length = self.model.config.context
        rows = []
        for _texts, context, continuation in requests:
            if len(continuation) > length:
                raise UsageError(
                    f"expected continuations of at most {length} tokens (the model's context), found {len(continuation)}"
                )
            rows.append((context + continuation)[-length - 1 :])
        results: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for batch in _batches([len(row) for row in rows]):
            tokens_BS = self._padded([rows[number] for number in batch])
            # float64: a sum over thousands of tokens keeps what distinguishes two models
            logits_BSV = self.model(tokens_BS[:, :-1], rule=self.rule).logits_BSV
            scores_BSV = logits_BSV.double().log_softmax(-1)
            best_BS = scores_BSV.argmax(-1)
            for row, number in enumerate(batch):
                end, count = len(rows[number]) - 1, len(requests[number][2])
                where = slice(end - count, end)
                target_S = tokens_BS[row, 1:][where]
                picked_S = scores_BSV[row, where].gather(1, target_S[:, None])[:, 0]
                results[number] = (float(picked_S.sum()), bool((best_BS[row, where] == target_S).all()))
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each up to the first stop text, the boundary token or the task's length."""
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            settings = dict(request.args[1])
            if settings.get("do_sample") or settings.get("temperature"):
                raise UsageError("a task asks for sampling (do_sample, temperature): generation here is greedy only")
            until = settings.get("until") or []
            stops = tuple([until] if isinstance(until, str) else until)
            wanted = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or _NEW_TOKENS)
            groups.setdefault((wanted, stops), []).append(number)
        texts = [""] * len(requests)
        for (wanted, stops), numbers in groups.items():
            # a short context is shared: at most half of it is for what is generated
            new = min(wanted, self.model.config.context // 2)
            prompts = [
                (self.tok_encode(requests[number].args[0]) or [self.eot_token_id])[-(self.model.config.context - new) :]
                for number in numbers
            ]
            for batch in _batches([len(prompt) + new for prompt in prompts]):
                found = self._generate([prompts[i] for i in batch], new, stops)
                for i, text in zip(batch, found, strict=True):
                    texts[numbers[i]] = text
        return texts

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], new: int, stops: Iterable[str]) -> list[str]:
        lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        cache = KeyValueCache(
            self.model.config,
            len(prompts),
            int(lengths_B.max()) + new,
            self._device,
            self.model.embedding_VD.dtype,
        )
        logits_BSV = self.model(self._padded(prompts), rule=self.rule, cache=cache).logits_BSV
        logits_BV = logits_BSV[torch.arange(len(prompts), device=self._device), lengths_B - 1]
        cache.length_B = lengths_B
        made: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        alive = list(range(len(prompts)))
        for step in range(new):
            next_B = logits_BV.argmax(-1)
            going = []
            for row, (number, token) in enumerate(zip(list(alive), next_B.tolist(), strict=True)):
                if token != self.eot_token_id:
                    made[number].append(token)
                    texts[number] = self.tokenizer.decode(made[number])
                    if not any(stop in texts[number] for stop in stops):
                        going.append(row)
            if not going or step == new - 1:
                break
            if len(going) < len(alive):
                rows = torch.tensor(going, device=self._device)
                cache.keep(rows)
                next_B, alive = next_B[rows], [alive[row] for row in going]
            logits_BV = self.model(next_B[:, None], rule=self.rule, cache=cache).logits_BSV[:, 0]
        return [_before(text, stops) for text in texts]

    def _padded(self, rows: list[list[int]]) -> Tensor:
        longest = max(map(len, rows))
        padded = [row + [self.eot_token_id] * (longest - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64, device=self._device)


def _before(text: str, stops: Iterable[str]) -> str:
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]


def _batches(lengths: list[int]) -> list[list[int]]:
    """Numbers of rows of about the same length, longest first, so many at once that a batch has `_BATCH_TOKENS`."""
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    batches = []
    while order:
        count = max(1, _BATCH_TOKENS // max(1, lengths[order[0]]))
        batches.append(order[:count])
        order = order[count:]
    return batches
