"""An endless order of samples; what is drawn for one depends on seed and position, not on who loads it or when."""

import hashlib
import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

UNREADABLE = (ValueError, OSError)  # what reading a damaged file raises
TRIES = 10  # files in a row that cannot be read: then it is not a file, but a disk


class Stream(Dataset):
    """Epoch after epoch, each a permutation of the samples; a step takes the next ones, a share of them each process.

    A sample that cannot be read is replaced by the next one in the order that can, and said.

    Args:
        data: samples (image, labels).
        batch_size: samples a step and process.
        seed: of the order, and of what samples draw from torch, NumPy and random.
        rank, processes: whose share.
        strict: a sample that cannot be read ends the training.
    """

    def __init__(
        self, data: Dataset, batch_size: int, seed: int, rank: int = 0, processes: int = 1, strict: bool = False
    ):
        self.data, self.batch_size, self.seed, self.rank, self.processes = data, batch_size, seed, rank, processes
        self.strict = strict
        self._epoch, self._order = -1, []

    def index(self, position: int, further: int = 0) -> int:
        """Which sample of the data set is at a position, or that many behind it in the order of its epoch."""
        epoch, i = divmod(position, len(self.data))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, "order", epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.data), generator=generator).tolist()
        return self._order[(i + further) % len(self.data)]

    def __getitem__(self, position: int) -> tuple[tuple[Tensor, Tensor] | None, list[str]]:
        """The sample (None: stop), and what could not be read before it."""
        unread = []
        with _seeded(mix(self.seed, "sample", position)):
            for further in range(min(TRIES, len(self.data))):
                try:
                    return self.data[self.index(position, further)], unread
                except UNREADABLE as error:
                    unread.append(str(error))
                    if self.strict:
                        break
        return None, unread

    def positions(self, step: int) -> range:
        """Of all processes at a step, counted from 1."""
        whole = self.batch_size * self.processes
        return range((step - 1) * whole, step * whole)

    def batches(self, done: int, steps: int, workers: int = 0) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        """(images [B, C, H, W], labels [B, H, W], what could not be read) of this process, for the steps after `done`.

        Raises:
            ValueError: a file that cannot be read, if strict; else ten of them in a row.
            RuntimeError: a process that loads data died.
        """
        own = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        sampler = (list(self.positions(step)[own]) for step in range(done + 1, steps + 1))
        pinned = torch.cuda.is_available()
        loader = DataLoader(
            self, batch_sampler=sampler, num_workers=workers, pin_memory=pinned, collate_fn=self._together
        )
        try:
            for images, labels, unread in loader:
                if images is None:
                    raise ValueError(unread[-1])
                yield images, labels, unread
        except RuntimeError as error:
            if not re.search(r"DataLoader worker \(pid.*(killed|exited)", str(error)):
                raise
            what = "a process that loads data was killed: out of memory, or of shared memory?"
            raise RuntimeError(f"{what} --workers 0 needs none, fewer workers need less") from error

    def _together(self, samples: list) -> tuple[Tensor | None, Tensor | None, list[str]]:
        unread = [problem for _, problems in samples for problem in problems]
        failed = next((problems for sample, problems in samples if sample is None), None)
        if failed is not None:
            said = "" if self.strict else f"{len(failed)} files in a row cannot be read; the last: "
            return None, None, [f"{said}{failed[-1]}"]
        images, labels = zip(*(sample for sample, _ in samples))
        return torch.stack(images), torch.stack(labels), unread


def default_workers(processes: int = 1) -> int:
    """Processes that load data for each of so many: as many as it has CPU cores, up to 8; without a GPU, whose work the

    cores then do, one at most.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // processes
    return min(8, share) if torch.cuda.is_available() else min(1, share // 2)


def mix(*parts) -> int:
    """A seed of its own for every combination of parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """What torch, NumPy and random draw inside depends on the seed; outside nothing changes."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        random.setstate(before[2])
