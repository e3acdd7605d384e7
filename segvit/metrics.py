"""Data-set-level scores from a streaming confusion matrix: memory does not depend on the number of images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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

    def table(self, class_names: Sequence[str]) -> str:
        """Per-class lines, and which classes the set does not have."""
        width = max(len("class"), *(len(name) for name in class_names))
        lines = [f"{'class':<{width}}    IoU    acc      pixels"]
        for name, iou, acc, pixels in zip(class_names, self.iou, self.acc, self.pixels):
            lines.append(f"{name:<{width}}  {_fraction(iou)}  {_fraction(acc)}  {pixels:>10}")
        if absent := self.absent(class_names):
            lines.append(f"not in this set, left out of the means: {', '.join(absent)}")
        return "\n".join(lines)

    def absent(self, class_names: Sequence[str]) -> list[str]:
        """Classes that the truth does not have."""
        return [name for name, pixels in zip(class_names, self.pixels) if not pixels]


def _fraction(value: float) -> str:
    return "    –" if value != value else f"{value:5.3f}"


class ConfusionMatrix:
    """counts[t, p]: pixels of truth t predicted as p; ignored pixels are not counted.

    Args:
        num_classes: K.
        ignore_index: label of pixels without a truth.
        device: where the counts are kept; labels should be there too.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str = "cpu"):
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(
        self,
        predicted: Tensor,  # integers [...]
        truth: Tensor,  # integers, the same shape
    ) -> None:
        """Add a batch. Where the truth is no class nothing is counted; a prediction that is no class raises ValueError

        on the CPU, and is not counted on a GPU, which the host would have to wait for.
        """
        if predicted.shape != truth.shape:
            raise ValueError(f"predicted {tuple(predicted.shape)} and truth {tuple(truth.shape)} must agree in shape")
        truth, predicted = truth.to(self.counts.device).long(), predicted.to(self.counts.device).long()
        valid = (truth >= 0) & (truth < self.num_classes) & (truth != self.ignore_index)
        if self.counts.device.type == "cpu" and not ((predicted >= 0) & (predicted < self.num_classes)).all():
            raise ValueError(f"predicted has labels outside 0 to {self.num_classes - 1}")
        valid &= (predicted >= 0) & (predicted < self.num_classes)
        index = torch.where(valid, truth * self.num_classes + predicted, self.num_classes**2)
        counts = torch.zeros(self.num_classes**2 + 1, dtype=torch.int64, device=index.device)
        counts.scatter_add_(0, index.flatten(), torch.ones_like(index).flatten())
        self.counts += counts[:-1].view_as(self.counts)

    def compute(self) -> Scores:
        """Scores of everything so far."""
        counts = self.counts.double().cpu()
        hit, truth, predicted = counts.diag(), counts.sum(1), counts.sum(0)
        there = torch.where(truth > 0, 1.0, torch.nan)
        iou, acc = there * hit / (truth + predicted - hit), hit / truth
        return Scores(
            miou=iou.nanmean().item(),
            macc=acc.nanmean().item(),
            aacc=(hit.sum() / counts.sum()).item(),
            iou=iou.tolist(),
            acc=acc.tolist(),
            pixels=truth.long().tolist(),
        )
