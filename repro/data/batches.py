"""Batches of windows, a pure function of (bytes, seed, step): a resumed run sees what an uninterrupted one would have seen.

- the text is cut into non-overlapping windows; an epoch is one seeded permutation of them, the next epoch another
- `Batches.at(step)` gives step's windows; every arm with the same seed gets the same tokens in the same order
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
    """Windows of `context` + 1 bytes, `batch` a step, drawn without replacement within an epoch."""

    data: Bytes
    batch: int
    context: int
    seed: int

    def __post_init__(self) -> None:
        if self.windows < self.batch:
            raise UsageError(
                f"expected at least {self.batch} windows of {self.context + 1} bytes, found {self.windows}: use a larger "
                "corpus, a smaller batch or a shorter context"
            )

    @property
    def windows(self) -> int:
        """Number of non-overlapping windows in the text (a window's last byte is only a target)."""
        return (len(self.data) - 1) // self.context

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and next tokens of `step` (from 0), both int64 of shape (batch, context)."""
        first = step * self.batch
        epochs = range(first // self.windows, (first + self.batch - 1) // self.windows + 1)
        order = np.concatenate([_permutation(self.windows, self.seed, epoch) for epoch in epochs])
        start = first - epochs[0] * self.windows
        return _windows(self.data, order[start : start + self.batch], self.context)


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
