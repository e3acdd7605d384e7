"""Mean and standard deviation of a data set's channels, in one pass."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from segvit.data.arrays import scaled
from segvit.data.dataset import SegmentationDataset
from segvit.data.images import load_image, read_image

THREADS = 8  # at most: a large photo takes some hundred megabytes while it is looked at
STRIP = 2**20  # values that are in float64 at once


@dataclass(frozen=True)
class Moments:
    """Of pixels as a model's mean and std count them: their number, mean and sum of squared distances from it, [C].

    All in float64; a sum of two is exact where sums of squares would cancel (Chan, Golub and LeVeque, 1983).
    """

    count: int = 0
    mean: np.ndarray | float = 0.0
    squares: np.ndarray | float = 0.0

    def __add__(self, other: "Moments") -> "Moments":
        count = max(self.count + other.count, 1)
        apart, share = other.mean - self.mean, other.count / count
        squares = self.squares + other.squares + apart**2 * self.count * share
        return Moments(self.count + other.count, self.mean + apart * share, squares)

    def lists(self, channels: int) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel; 0 where it is less than float32 resolves beside the mean."""
        std = np.sqrt(self.squares / max(self.count, 1))
        std = np.where(std > np.finfo(np.float32).eps * np.abs(self.mean), std, 0)
        return tuple(np.broadcast_to(values, channels).tolist() for values in (self.mean, std))


def image_moments(image: Image.Image | np.ndarray) -> Moments:
    """Of one image of read_image."""
    if isinstance(image, Image.Image):  # 256 values: counting them needs no copy of the picture
        counts, values = np.array(image.histogram(), np.float64).reshape(-1, 256), np.arange(256) / 255
        pixels = image.width * image.height
        mean = counts @ values / pixels
        return Moments(pixels, mean, (counts * (values - mean[:, None]) ** 2).sum(1))
    rows = max(STRIP // (image.shape[1] * image.shape[2]), 1)
    strips = (image[top : top + rows] for top in range(0, len(image), rows))
    return sum((_strip_moments(scaled(strip).astype(np.float64)) for strip in strips), Moments())


def _strip_moments(values: np.ndarray) -> Moments:
    mean = values.mean((0, 1))
    return Moments(values.shape[0] * values.shape[1], mean, ((values - mean) ** 2).sum((0, 1)))


def channel_statistics(dataset: SegmentationDataset, most: int = 500) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of up to `most` images spread evenly over the data set.

    They count as SegViT's mean and std do: uint8 / 255, 16-bit integers / 65535, floats as they are. A channel that
    never changes has the standard deviation 1, so that it can be divided by.

    Raises what read_image raises.
    """
    chosen = np.linspace(0, len(dataset) - 1, min(len(dataset), most)).round().astype(int)
    paths = [dataset.pairs[i][0] for i in chosen]
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, THREADS))
    try:
        total = sum(pool.map(lambda path: image_moments(read_image(path, dataset.channels)), paths), Moments())
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for all files
    mean, std = total.lists(dataset.channels)
    return mean, [value if value > 0 else 1.0 for value in std]


def input_options(dataset: SegmentationDataset) -> dict:
    """in_chans, mean and std of a SegViT that is new to these images; nothing for photos, as the backbone knows them.

    Photos are 3 channels of 8 bits, which one file of each kind tells.
    """
    kinds = {path.suffix.lower(): path for path, _ in reversed(dataset.pairs)}.values()
    if dataset.channels == 3 and all(_eight_bits(load_image(path).image) for path in kinds):
        return {}
    mean, std = channel_statistics(dataset)
    return {"in_chans": dataset.channels, "mean": mean, "std": std}


def _eight_bits(image: Image.Image | np.ndarray) -> bool:
    return isinstance(image, Image.Image) or image.dtype == np.uint8
