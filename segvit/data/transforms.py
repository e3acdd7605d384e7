"""Augmentation as in the paper, on torchvision.transforms.v2."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2


class RandomScaleCrop(v2.Transform):
    """Resize by a random factor (of `short_side`, if given), then crop to `size`; too small images are padded.

    A crop in which one class covers more than cat_max_ratio of the labelled pixels is drawn again, up to ten times.
    Padding is black in images of 8 bits, and `fill` in float images, where 0 may lie far from every value.
    """

    def __init__(
        self,
        size: tuple[int, int],
        scale: tuple[float, float] = (0.5, 2.0),
        ignore_index: int = 255,
        cat_max_ratio: float = 0.75,
        short_side: int | None = None,
        fill: float | Sequence[float] = 0,
    ):
        super().__init__()
        self.size, self.scale, self.ignore_index, self.cat_max_ratio = tuple(size), scale, ignore_index, cat_max_ratio
        self.short_side, self.fill = short_side, fill

    def forward(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        factor = torch.empty(()).uniform_(*self.scale).item()
        factor *= self.short_side / min(image.shape[-2:]) if self.short_side else 1
        size = [max(round(n * factor), 1) for n in image.shape[-2:]]
        image, labels = v2.functional.resize(image, size, antialias=True), v2.functional.resize(labels, size)
        padding = [0, 0, max(self.size[1] - size[1], 0), max(self.size[0] - size[0], 0)]
        image = v2.functional.pad(image, padding, fill=self.fill if image.is_floating_point() else 0)
        labels = v2.functional.pad(labels, padding, fill=self.ignore_index)
        for _ in range(10):
            top, left = (int(torch.randint(n - crop + 1, ())) for n, crop in zip(image.shape[-2:], self.size))
            part = labels[..., top : top + self.size[0], left : left + self.size[1]]
            counts = part[part != self.ignore_index].unique(return_counts=True)[1]
            if len(counts) > 1 and counts.max() < self.cat_max_ratio * counts.sum():
                break
        box = (top, left, *self.size)
        return v2.functional.crop(image, *box), v2.functional.crop(labels, *box)


class TrainTransform:
    """Random scale and crop, flip, photometric distortion, normalisation: float [C, H, W] and int64 [H, W].

    Images are uint8, or float32 on the scale of `mean` and `std`; only 8-bit images of three channels are photos, whose
    colours are distorted.
    """

    def __init__(
        self,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        ignore_index: int = 255,
        scale: tuple[float, float] = (0.5, 2.0),
        short_side: int | None = None,
    ):
        crop = RandomScaleCrop(size, scale, ignore_index, short_side=short_side, fill=list(mean))
        self.augment, self.distort = v2.Compose([crop, v2.RandomHorizontalFlip()]), v2.RandomPhotometricDistort()
        self.mean, self.std = (torch.tensor(list(values))[:, None, None] for values in (mean, std))

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        image, labels = self.augment(tv_tensors.Image(image), tv_tensors.Mask(labels))
        if image.dtype == torch.uint8:
            image = (self.distort(image) if len(image) == 3 else image).float() / 255
        return (image.as_subclass(Tensor) - self.mean) / self.std, labels.as_subclass(Tensor)
