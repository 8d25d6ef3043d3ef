"""Batches of windows, a pure function of (bytes, seed, step): a resumed run sees what an uninterrupted one would have seen.

- the text is cut into non-overlapping windows; an epoch is one seeded permutation of them, the next epoch another
- with `unique` tokens, only the first so many of the seed's first epoch are ever used, each later epoch in a new order
- `Batches.at(step)` gives step's windows; every arm with the same seed gets the same tokens in the same order
- `check_supply` refuses a training that would see its text more often than it is meant to
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from records.errors import UsageError
from repro.data.corpus import Bytes
from repro.seeds import derive

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """Windows of `context` + 1 bytes, `batch` a step, drawn without replacement within an epoch.

    With `unique` > 0 an epoch is that many tokens, the same in every epoch (rounded down to whole windows): an arm that
    uses all of them once and one that comes back to them see the same text.
    """

    data: Bytes
    batch: int
    context: int
    seed: int
    unique: int = 0

    def __post_init__(self) -> None:
        if self.unique and not self.batch * self.context <= self.unique <= self.available * self.context:
            raise UsageError(
                f"expected unique tokens from {self.batch * self.context} (one batch) to {self.available * self.context} "
                f"(the corpus in whole windows), found {self.unique}"
            )
        if self.windows < self.batch:
            raise UsageError(
                f"expected at least {self.batch} windows of {self.context + 1} bytes, found {self.windows}: use a larger "
                "corpus, a smaller batch or a shorter context"
            )

    @property
    def available(self) -> int:
        """Number of non-overlapping windows in the text (a window's last byte is only a target)."""
        return (len(self.data) - 1) // self.context

    @property
    def windows(self) -> int:
        """Number of windows in an epoch."""
        return self.unique // self.context if self.unique else self.available

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and next tokens of `step` (from 0), both int64 of shape (batch, context)."""
        first = step * self.batch
        epochs = range(first // self.windows, (first + self.batch - 1) // self.windows + 1)
        order = np.concatenate([self._order(epoch) for epoch in epochs])
        start = first - epochs[0] * self.windows
        return _windows(self.data, order[start : start + self.batch], self.context)

    def _order(self, epoch: int) -> Index:
        if not self.unique:
            return _permutation(self.available, self.seed, epoch)
        return _reused(self.available, self.windows, self.seed, epoch)


def check_supply(*, tokens: int, context: int, available: int, unique: int, epochs: int, name: str) -> None:
    """Refuse a training on `tokens` tokens that would see some of its text more than `epochs` times (0: any number).

    Args:
        available: bytes of the training text.
        unique: as in `Batches`; 0 for the whole text.
        name: what is trained, for the message.

    Raises:
        UsageError: more unique tokens asked for than there are, or more epochs needed; says how many it would take.
    """
    whole = (available - 1) // context * context
    supply = min(unique // context * context, whole) if unique else whole
    if supply < 1:
        raise UsageError(f"{name}: expected at least {context + 1} bytes of text, found {available}")
    needed = tokens / supply
    if unique > whole:
        raise UsageError(
            f"{name}: expected {unique:,} unique tokens, found {whole:,} in the corpus: its {tokens:,} tokens would take "
            f"{tokens / whole:.2f} epochs; use a larger corpus or declare the reuse"
        )
    if epochs and needed > epochs:
        raise UsageError(
            f"{name}: expected at most {epochs} epoch{'s' if epochs > 1 else ''}, found that {tokens:,} tokens out of "
            f"{supply:,} unique ones take {needed:.2f}; use a larger corpus or declare the reuse"
        )


def prefetch(
    batches: Batches, steps: Iterable[int], device: torch.device
) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """(step, tokens and next tokens on `device`) for each of `steps`.

    On a GPU a thread cuts the next batch into pinned memory while the device works on this one; on a CPU, where the
    arms' processes fill the cores, it is made when it is needed.
    """
    if device.type == "cpu":
        for step in steps:
            yield step, batches.at(step)
        return

    def make(step: int) -> tuple[Tensor, Tensor]:
        tokens_BS, targets_BS = batches.at(step)
        return tokens_BS.pin_memory(), targets_BS.pin_memory()

    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: deque[tuple[int, Future[tuple[Tensor, Tensor]]]] = deque()
        for step in steps:
            waiting.append((step, pool.submit(make, step)))
            if len(waiting) > 2:
                yield _arrived(*waiting.popleft(), device)
        while waiting:
            yield _arrived(*waiting.popleft(), device)


def _arrived(
    step: int, made: "Future[tuple[Tensor, Tensor]]", device: torch.device
) -> tuple[int, tuple[Tensor, Tensor]]:
    tokens_BS, targets_BS = made.result()
    return step, (tokens_BS.to(device, non_blocking=True), targets_BS.to(device, non_blocking=True))


def evaluation_windows(data: Bytes, *, tokens: int, context: int) -> tuple[Tensor, Tensor]:
    """Evenly spaced windows that hold about `tokens` tokens, as (tokens, next tokens) of shape (windows, context)."""
    available = (len(data) - 1) // context
    wanted = max(1, min(tokens // context, available))
    if not available:
        raise UsageError(f"expected at least {context + 1} held-out bytes, found {len(data)}")
    return _windows(data, np.arange(wanted) * available // wanted, context)


def _windows(data: Bytes, index: Index, context: int) -> tuple[Tensor, Tensor]:
    rows = np.stack([data[i * context : i * context + context + 1] for i in index.tolist()])
    window_BS = torch.from_numpy(rows.astype(np.int64))
    return window_BS[:, :-1].contiguous(), window_BS[:, 1:].contiguous()


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> Index:
    # Philox's raw stream is fixed by numpy's compatibility policy; Generator.permutation is not.
    return np.argsort(np.random.Philox(key=derive(seed, "batches", epoch)).random_raw(n), kind="stable")


@lru_cache(maxsize=2)
def _reused(n: int, unique: int, seed: int, epoch: int) -> Index:
    """The first `unique` of n windows in the seed's own order, from the second epoch on each time in another."""
    first = _permutation(n, seed, 0)[:unique]
    return first if epoch == 0 else first[_permutation(unique, seed, epoch)]
