"""Evaluation on a data set: images are read ahead and shared between processes, and only counts are kept."""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from segvit.data.stream import UNREADABLE
from segvit.inference import normalise, predict
from segvit.metrics import BoundaryIoU, ConfusionMatrix, Scores

AHEAD = 2  # samples that each worker reads ahead
CAUGHT = (*UNREADABLE, RuntimeError)


def evaluate(
    model: nn.Module,
    data: Dataset,
    ignore_index: int = 255,
    progress: bool = True,
    stopped: Callable[[], bool] = lambda: False,
    boundary: float | None = None,
    *,
    workers: int = 0,
    strict: bool = True,
    processes: tuple[int, int] = (0, 1),
    watch: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
    **options,
) -> Scores:
    """mIoU, mAcc, aAcc and per-class scores of a model on a data set, from counts that stay on the model's device.

    Memory does not depend on the number of images: at most one sample, and two for each worker, are held at a time.

    Args:
        model: a SegViT.
        data: samples (image uint8 [C, H, W], labels [H, W]) of any sizes.
        ignore_index: label that does not count.
        progress: show a progress bar.
        stopped: asked after every image; true raises KeyboardInterrupt.
        boundary: also the boundary IoU within this share of the image's diagonal (0.02 in the paper).
        workers: processes that read images ahead; samples come in the data set's order all the same.
        strict: a sample that cannot be read is an error; else it is left out, named on stderr and counted.
        processes: (rank, count) of torch.distributed: this one evaluates samples rank, rank + count, …, and all return
            the scores of all samples.
        watch: called for every sample of this process with (i, image, labels, predicted), the image as the data set
            gave it, labels and predicted [H, W] on the model's device.
        options: of segvit.predict, such as mode, crop_size, stride, short_side, scales, flip.

    Raises:
        ValueError: labels of another size than their image, options that predict refuses, or no sample could be read.
        ValueError, OSError, RuntimeError: a sample that cannot be read, where strict; the other processes then wait in
            vain, until their launcher ends them.
    """
    rank, count = processes
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    if not 0 <= rank < count:
        raise ValueError(f"processes must be (rank, count) with 0 <= rank < count, got {processes}")
    device = next(model.parameters()).device
    matrix = ConfusionMatrix(model.num_classes, ignore_index, device)
    edges = None if boundary is None else BoundaryIoU(model.num_classes, ignore_index, device, boundary)
    left_out = torch.zeros((), dtype=torch.int64, device=device)
    samples = _read_ahead(data, range(rank, len(data), count), workers)
    for i, sample in tqdm(samples, desc="evaluating", unit="image", disable=not progress, leave=False):
        if isinstance(sample, Exception):
            if strict:
                raise sample
            tqdm.write(f"left out: {_reason(data, i, sample)}", file=sys.stderr)
            left_out += 1
            continue
        image, labels = sample
        labels, predicted = labels.to(device), predict(model, normalise(model, image[None]), **options)[0]
        matrix.update(predicted, labels)
        if edges is not None:
            edges.update(predicted, labels)
        if watch is not None:
            watch(i, image, labels, predicted)
        if stopped():
            raise KeyboardInterrupt("stopped during an evaluation")
    if count > 1:
        for counts in (matrix.counts, left_out, *(() if edges is None else (edges.counts,))):
            dist.all_reduce(counts)
    missing = left_out.item()
    if missing and missing == len(data):
        raise ValueError(f"none of the {missing} images can be read")
    scores = replace(matrix.compute(), left_out=missing)
    if edges is None:
        return scores
    per_class = edges.compute()
    return replace(scores, boundary_iou=per_class, boundary_miou=torch.tensor(per_class).nanmean().item())


class _Samples(Dataset):
    """(i, sample i, or what was raised instead) of some positions: an error in a worker arrives as it was raised."""

    def __init__(self, data: Dataset, positions: range):
        self.data, self.positions = data, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, n: int) -> tuple:
        i = self.positions[n]
        try:
            return i, self.data[i]
        except CAUGHT as error:
            if type(error).__module__ == "builtins":
                return i, error
            kind = next(kind for kind in CAUGHT if isinstance(error, kind))
            return i, kind(str(error))  # what libraries define may not survive the way out of a worker


def _read_ahead(data: Dataset, positions: range, workers: int) -> DataLoader:
    """(i, sample or error) in order."""
    return DataLoader(
        _Samples(data, positions),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        generator=torch.Generator(),  # so that an evaluation draws nothing from the global one
    )


def sample_name(data: Dataset, i: int) -> str:
    """The image file of a sample, or its number where the data set names no files."""
    pairs = getattr(data, "pairs", None)
    return str(pairs[i][0]) if pairs else f"sample {i}"


def _reason(data: Dataset, i: int, error: Exception) -> str:
    """One line that names a sample and why it cannot be read."""
    line = " ".join(str(error).split()) or type(error).__name__
    files = data.pairs[i] if hasattr(data, "pairs") else ()
    return line if any(str(path) in line for path in files) else f"{sample_name(data, i)}: {line}"
