import os
import random
import signal

import numpy as np
import pytest
import torch

from segvit.data import Shapes
from segvit.data.stream import TRIES, Stream


class Numbers(torch.utils.data.Dataset):
    """Sample i is i; those in `bad` cannot be read."""

    def __init__(self, length, bad=(), error=ValueError):
        self.length, self.bad, self.error = length, bad, error

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if i in self.bad:
            raise self.error(f"{i}.jpg: not a readable image")
        return torch.tensor(i), torch.tensor(-i)


def drawn(stream, done, steps, workers=0):
    return [images.tolist() for images, _, _ in stream.batches(done, steps, workers)]


def order(stream, done, steps):
    return [number for batch in drawn(stream, done, steps) for number in batch]


def test_every_epoch_is_a_permutation_and_processes_share_it():
    data = Numbers(10)
    stream = Stream(data, 2, 7)
    epochs = [order(stream, 5 * epoch, 5 * epoch + 5) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order(Stream(data, 2, 8), 0, 5) != epochs[0]
    shares = [drawn(Stream(data, 2, 7, rank, 2), 1, 5) for rank in (0, 1)]
    whole = drawn(Stream(data, 4, 7), 1, 5)
    assert [a + b for a, b in zip(*shares)] == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_drawn_depends_on_the_step_alone(workers):
    """Whether it is drawn from torch, NumPy or random; and the main process's numbers are left alone."""

    def noisy(image, labels):
        return image.float() / 127.5 - 1 + torch.randn(image.shape) + np.random.randn() + random.random(), labels  # noqa: NPY002

    stream = Stream(Shapes(10, 32, transform=noisy), 2, 7)
    want = [stream[position][0][0] for position in range(6, 10)]
    torch.manual_seed(99)
    random.seed(99)
    got = torch.cat([images for images, _, _ in stream.batches(3, 5, workers)])
    assert torch.equal(got, torch.stack(want))
    after = random.random()
    random.seed(99)
    assert random.random() == after


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [ValueError, OSError])
def test_a_sample_that_cannot_be_read_is_replaced_by_the_next_and_said(workers, error):
    numbers = order(Stream(Numbers(10), 5, 7), 0, 2)
    for bad in ({numbers[3]}, {numbers[3], numbers[4]}, {numbers[-1]}):
        stream = Stream(Numbers(10, bad, error), 5, 7)
        batches = list(stream.batches(0, 2, workers))
        got = [number for images, _, _ in batches for number in images.tolist()]
        assert [a for a in got if a not in bad] == got
        kept = [i for i, number in enumerate(numbers) if number not in bad]
        assert [got[i] for i in kept] == [numbers[i] for i in kept]  # all others are where they were
        behind = next(numbers[(i + 1) % 10] for i in range(9, -1, -1) if numbers[i] in bad)
        assert all(got[i] == behind for i in range(10) if numbers[i] in bad)
        said = [problem for _, _, unread in batches for problem in unread]
        assert {f"{number}.jpg: not a readable image" for number in bad} == set(said)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_read_stops_a_strict_training(workers):
    numbers = order(Stream(Numbers(10), 5, 7), 0, 2)
    stream = Stream(Numbers(10, {numbers[7]}), 5, 7, strict=True)
    batches = stream.batches(0, 2, workers)
    assert next(batches)[0].tolist() == numbers[:5]
    with pytest.raises(ValueError, match=rf"^{numbers[7]}\.jpg: not a readable image$"):
        next(batches)


@pytest.mark.parametrize(("length", "most"), [(100, TRIES), (3, 3)])
def test_a_disk_that_cannot_be_read_stops_training(length, most):
    stream = Stream(Numbers(length, range(length), OSError), 2, 7)
    with pytest.raises(ValueError, match=rf"^{most} files in a row cannot be read; the last: \d+\.jpg: not a readable"):
        next(stream.batches(0, 1))


def test_errors_of_code_are_not_taken_for_bad_files():
    with pytest.raises(ZeroDivisionError):
        next(Stream(Numbers(10, range(10), ZeroDivisionError), 2, 7).batches(0, 1))


def test_a_loader_that_was_killed_is_said():
    class Killing(Numbers):
        def __getitem__(self, i):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match=r"a process that loads data was killed: out of memory.*--workers 0"):
        next(Stream(Killing(10), 2, 7).batches(0, 1, workers=1))
