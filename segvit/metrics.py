"""Data-set-level scores from a streaming confusion matrix: memory does not depend on the number of images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Fractions in 0…1. A class that is absent from the truth has IoU and accuracy NaN and is left out of means."""

    miou: float
    macc: float
    aacc: float
    iou: list[float]  # per class
    acc: list[float]  # per class: recall
    pixels: list[int]  # per class, in the truth
    boundary_miou: float | None = None  # where it was asked for
    boundary_iou: list[float] | None = None  # per class
    confusion: list[list[int]] | None = None  # [K][K + 1] pixels of truth t predicted as p, or in the end as no class
    left_out: int = 0  # images that could not be read

    def table(self, class_names: Sequence[str]) -> str:
        """Per-class lines, and which classes the set does not have."""
        width = max(len("class"), *(len(name) for name in class_names))
        columns = [self.iou, self.acc] + ([] if self.boundary_iou is None else [self.boundary_iou])
        heads = ("    IoU", "    acc", "  b.IoU")[: len(columns)]
        lines = [f"{'class':<{width}}{''.join(heads)}      pixels"]
        for name, pixels, *values in zip(class_names, self.pixels, *columns):
            lines.append(f"{name:<{width}}  {'  '.join(_fraction(value) for value in values)}  {pixels:>10}")
        if absent := self.absent(class_names):
            lines.append(f"not in this set, left out of the means: {', '.join(absent)}")
        return "\n".join(lines)

    def absent(self, class_names: Sequence[str]) -> list[str]:
        """Classes that the truth does not have."""
        return [name for name, pixels in zip(class_names, self.pixels) if not pixels]


def _fraction(value: float) -> str:
    return "    –" if value != value else f"{value:5.3f}"


class ConfusionMatrix:
    """counts[t, p]: pixels of truth t predicted as p, or in the last column as no class; ignored pixels do not count.

    Args:
        num_classes: K.
        ignore_index: label of pixels without a truth.
        device: where the counts are kept; labels should be there too.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str = "cpu"):
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.counts = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64, device=device)

    def update(
        self,
        predicted: Tensor,  # integers [...]
        truth: Tensor,  # integers, the same shape
    ) -> None:
        """Add a batch. Where the truth is no class nothing is counted; a prediction that is no class raises ValueError

        on the CPU, and is an error of the truth's class on a GPU, which the host would have to wait for.
        """
        K = self.num_classes
        truth, predicted = _alike(truth, predicted, self.counts.device)
        known = (predicted >= 0) & (predicted < K)
        if self.counts.device.type == "cpu" and not known.all():
            raise ValueError(f"predicted has labels outside 0 to {K - 1}")
        valid = _counts(truth, K, self.ignore_index)
        self.counts += _histogram(truth * (K + 1) + torch.where(known, predicted, K), valid, K * (K + 1)).view(K, K + 1)

    def compute(self) -> Scores:
        """Scores of everything so far."""
        counts = self.counts.double().cpu()
        hit, truth, predicted = counts.diag(), counts.sum(1), counts.sum(0)[:-1]
        there = torch.where(truth > 0, 1.0, torch.nan)
        iou, acc = there * hit / (truth + predicted - hit), hit / truth
        return Scores(
            miou=iou.nanmean().item(),
            macc=acc.nanmean().item(),
            aacc=(hit.sum() / counts.sum()).item(),
            iou=iou.tolist(),
            acc=acc.tolist(),
            pixels=truth.long().tolist(),
            confusion=self.counts.tolist(),
        )


class BoundaryIoU:
    """IoU of the two labellings' boundaries, per class: what of a class lies within a distance of where it ends.

    (Boundary IoU, arXiv 2103.16562, for label maps: one boundary serves all classes. The image's own edge ends a class,
    as does an ignored region, in both labellings; ignored pixels do not count. Distances are of rows and columns: a
    square neighbourhood.)

    Args:
        num_classes: K.
        ignore_index: label of pixels without a truth.
        device: where the counts are kept; labels should be there too.
        distance: share of the image's diagonal, 0.02 in the paper; at least one pixel.
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        device: torch.device | str = "cpu",
        distance: float = 0.02,
    ):
        if not 0 < distance < 1:
            raise ValueError(f"distance must be a share of the diagonal, between 0 and 1, got {distance}")
        self.num_classes, self.ignore_index, self.distance = num_classes, ignore_index, distance
        self.counts = torch.zeros(3, num_classes, dtype=torch.int64, device=device)  # in both, predicted, truth

    def update(
        self,
        predicted: Tensor,  # integers [..., H, W]
        truth: Tensor,  # integers, the same shape
    ) -> None:
        """Add a batch of label maps. Raises ValueError for shapes that differ."""
        K = self.num_classes
        truth, predicted = _alike(truth, predicted, self.counts.device)
        reach = max(round(self.distance * (truth.shape[-2] ** 2 + truth.shape[-1] ** 2) ** 0.5), 1)
        valid = _counts(truth, K, self.ignore_index)
        edge, edge_predicted = boundary(truth, reach), boundary(torch.where(valid, predicted, truth), reach)
        edge_predicted &= (predicted >= 0) & (predicted < K)
        both = valid & edge & edge_predicted & (truth == predicted)
        self.counts[0] += _histogram(truth, both, K)
        self.counts[1] += _histogram(predicted, valid & edge_predicted, K)
        self.counts[2] += _histogram(truth, valid & edge, K)

    def compute(self) -> list[float]:
        """IoU per class; NaN where the truth has no boundary of it."""
        both, predicted, truth = self.counts.double().cpu()
        return torch.where(truth > 0, both / (predicted + truth - both), torch.nan).tolist()


def boundary(labels: Tensor, reach: int) -> Tensor:  # [..., H, W], bool
    """Pixels with another label, or the image's edge, within `reach` rows and columns."""
    H, W = labels.shape[-2:]
    x = labels.reshape(-1, 1, H, W).float()  # exact below 2²⁴
    x = torch.cat([x, -x], 1)
    for window, padding in (((2 * reach + 1, 1), (reach, 0)), ((1, 2 * reach + 1), (0, reach))):
        x = F.max_pool2d(x, window, stride=1, padding=padding)
    found = x[:, 0] != -x[:, 1]
    for axis, size in ((-2, H), (-1, W)):
        found.narrow(axis, 0, min(reach, size)).fill_(True)
        found.narrow(axis, max(size - reach, 0), min(reach, size)).fill_(True)
    return found.view(labels.shape)


def _alike(truth: Tensor, predicted: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    if predicted.shape != truth.shape:
        raise ValueError(f"predicted {tuple(predicted.shape)} and truth {tuple(truth.shape)} must agree in shape")
    return truth.to(device).long(), predicted.to(device).long()


def _counts(truth: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return (truth >= 0) & (truth < num_classes) & (truth != ignore_index)


def _histogram(index: Tensor, valid: Tensor, bins: int) -> Tensor:
    """How often each of 0 … bins - 1 occurs where valid; nothing waits for the device."""
    index = torch.where(valid, index, bins).flatten()
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, index, torch.ones_like(index))[:-1]
