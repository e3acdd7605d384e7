"""The embedded data set: textured shapes that overlap, on a textured background, with a few unlabelled pixels."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

CLASSES = ("background", "disc", "square", "triangle", "ring", "cross")
IGNORE = 255
# Base colour of each class, RGB in 0…1; every object's colour scatters around it, so colours overlap between classes.
COLOURS = np.array(
    [(0.5, 0.5, 0.5), (0.8, 0.35, 0.3), (0.3, 0.65, 0.35), (0.35, 0.4, 0.8), (0.8, 0.7, 0.3), (0.65, 0.4, 0.7)]
)


class Shapes(Dataset):
    """`length` images uint8 [3, size, size] with labels int64 [size, size]; sample i depends on (seed, i) alone.

    Two to five objects of five classes; later ones occlude earlier ones. A class shows in its outline, its texture
    and, roughly, its colour. Labels: 0 background, 1–5 objects, 255 where a patch is left unlabelled.
    """

    classes = CLASSES
    ignore_index = IGNORE

    def __init__(self, length: int, size: int = 96, seed: int = 0, transform=None):
        self.length, self.size, self.seed, self.transform = length, size, seed, transform

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not 0 <= i < self.length:
            raise IndexError(i)
        image, labels = _sample(np.random.default_rng((self.seed, i)), self.size)
        image, labels = torch.from_numpy(image), torch.from_numpy(labels)
        return self.transform(image, labels) if self.transform else (image, labels)


def _sample(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:size, :size]
    image = _paint(rng, 0, x, y)
    labels = np.zeros((size, size), np.int64)
    for _ in range(rng.integers(2, 6)):
        kind = int(rng.integers(1, len(CLASSES)))
        inside = _outline(
            kind, x, y, rng.uniform(0.15, 0.85, 2) * size, rng.uniform(0.14, 0.26) * size, rng.uniform(0, np.pi)
        )
        image[inside] = _paint(rng, kind, x, y)[inside]
        labels[inside] = kind
    top, left = rng.integers(0, size - size // 8, 2)
    labels[top : top + size // 8, left : left + size // 8] = IGNORE
    light = rng.uniform(0.8, 1.15) + rng.uniform(-0.15, 0.15) * (x / size - 0.5)
    noisy = image * light[:, :, None] + rng.normal(0, 0.04, image.shape)
    return (noisy.clip(0, 1) * 255).astype(np.uint8).transpose(2, 0, 1).copy(), labels


def _outline(kind: int, x, y, centre, radius: float, angle: float) -> np.ndarray:
    """Pixels inside a shape, turned by `angle`; [size, size] bool."""
    dy, dx = y - centre[0], x - centre[1]
    u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    far = np.hypot(u, v)
    return {
        1: far < radius,
        2: np.maximum(abs(u), abs(v)) < 0.85 * radius,
        3: (v < 0.6 * radius) & (v > 1.8 * abs(u) - 1.1 * radius),
        4: (far < 1.1 * radius) & (far > 0.5 * radius),
        5: (np.minimum(abs(u), abs(v)) < 0.32 * radius) & (np.maximum(abs(u), abs(v)) < 1.1 * radius),
    }[kind]


def _paint(rng: np.random.Generator, kind: int, x, y) -> np.ndarray:
    """Colour and texture of one object over the whole image; [size, size, 3] in 0…1."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 8)
    u = (x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period
    v = (y * np.cos(angle) - x * np.sin(angle)) * 2 * np.pi / period
    texture = {
        0: np.zeros_like(u),
        1: np.sin(u),  # stripes
        2: np.sign(np.sin(u) * np.sin(v)),  # checks
        3: np.zeros_like(u),  # plain
        4: 2.0 * ((np.sin(u) * np.sin(v)) > 0.4) - 0.5,  # dots
        5: rng.normal(0, 1, u.shape),  # grain
    }[kind]
    colour = COLOURS[kind] + rng.normal(0, 0.09, 3)
    return colour + 0.13 * texture[:, :, None]
