"""Pairs of image and label files as a data set, with labels renumbered on the way if need be."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from segvit.data.images import ImageFile, load_image, parse_colour, read_labels, to_tensor

LARGEST = 2**16  # labels in files are below this
UNKNOWN = np.iinfo(np.int64).min  # class number of a colour without a name; no ignore_index is that


def read_classes(path: str | Path) -> list[str]:
    """Class names, one a line, from a text file; line i names class i.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no names, or one that occurs twice.
    """
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; it should name one class a line") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error.reason})") from None
    if not any(names):
        raise ValueError(f"{path}: no class names; write one a line")
    if "" in names:
        raise ValueError(f"{path}: line {names.index('') + 1} is empty; line i names class i")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: names that occur twice: {', '.join(twice)}")
    return names


class SegmentationDataset(Dataset):
    """Image files with a label map each.

    A label map has one channel of class numbers, 0 to K−1 in the order of `classes`, and ignore_index elsewhere; files
    that number otherwise are renumbered by `label_map`.

    Args:
        pairs: (image file, label file).
        classes: K class names.
        ignore_index: label of pixels without a truth.
        label_map: number in the files → class number or ignore_index; numbers that are not named stay. Keys that are
            colours ("#804080") read label images in colour, and must then name every colour that occurs.
        transform: called with image [C, H, W] and labels int64 [H, W]; returns both. Images of 8 bits are uint8, others
            float32: 16-bit integers / 65535, floats as they are.
        channels: of the images; pictures are read as RGB for 3 and as grey for 1, see segvit.data.read_image.

    Raises (at once, or for a sample when it is read):
        FileNotFoundError: a file that is not there, named.
        ValueError: a label map of another size; a label that is no class, named with its file; a map to no class.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path]],
        classes: Sequence[str],
        ignore_index: int = 255,
        label_map: Mapping[int | str, int] | None = None,
        transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        channels: int = 3,
    ):
        self.pairs, self.classes, self.ignore_index = list(pairs), list(classes), ignore_index
        self.transform, self.channels = transform, channels
        K = len(self.classes)
        if 0 <= ignore_index < K:
            name = self.classes[ignore_index]
            raise ValueError(f"ignore_index {ignore_index} is the number of the class {name!r}; choose another")
        label_map = dict(label_map or {})
        for number, target in label_map.items():
            if not isinstance(target, int) or not (0 <= target < K or target == ignore_index):
                raise ValueError(
                    f"label_map: {number!r} goes to {target!r}, which is neither a class (0 to {K - 1}) "
                    f"nor ignore_index {ignore_index}"
                )
        self.colours = {parse_colour(n): t for n, t in label_map.items() if isinstance(n, str) and n.startswith("#")}
        if self.colours and len(self.colours) < len(label_map):
            raise ValueError("label_map: either numbers or colours, not both")
        self._table = _table(label_map) if label_map and not self.colours else None

    def __len__(self) -> int:
        return len(self.pairs)

    def subset(self, pairs: Sequence[tuple[Path, Path]]) -> "SegmentationDataset":
        """The same with other files."""
        other = copy.copy(self)
        other.pairs = list(pairs)
        return other

    def read_labels(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Label map i as the file has it, and as class numbers; [H, W] integers. Unknown numbers are left in both."""
        path = self.pairs[i][1]
        raw = read_labels(path, colours=bool(self.colours))
        if self.colours:
            codes = np.array(sorted(self.colours))
            targets = np.array([self.colours[code] for code in codes], np.int64)
            place = np.searchsorted(codes, raw).clip(max=len(codes) - 1)
            return raw, np.where(codes[place] == raw, targets[place], UNKNOWN)
        if self._table is None:
            return raw, raw
        if raw.min() < 0 or raw.max() >= LARGEST:
            raise ValueError(f"{path}: label {raw.max() if raw.max() >= LARGEST else raw.min()} is not in 0 to 65535")
        return raw, self._table[raw]

    def unknown(self, labels: np.ndarray) -> np.ndarray:
        """Where class numbers are neither a class nor ignored; bool [H, W]."""
        return ((labels < 0) | (labels >= len(self.classes))) & (labels != self.ignore_index)

    def describe(self, value: int) -> str:
        """A label as the file has it, for messages."""
        return f"#{value:06x}" if self.colours else str(value)

    def load(self, i: int) -> tuple[ImageFile, np.ndarray, np.ndarray]:
        """Pair i: the image, the labels as stored, and as class numbers."""
        image_path, label_path = self.pairs[i]
        image = load_image(image_path, self.channels)
        raw, labels = self.read_labels(i)
        if labels.shape != image.size[::-1]:
            sizes = f"the label map is {labels.shape[1]}x{labels.shape[0]}, its image {image.size[0]}x{image.size[1]}"
            turned = (
                "; it lacks the image's EXIF rotation: turn it, or strip the tag"
                if labels.shape == image.stored[::-1]
                else ""
            )
            raise ValueError(f"{label_path}: {sizes}{turned}")
        return image, raw, labels

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, raw, labels = self.load(i)
        strange = raw[self.unknown(labels)]
        if len(strange):
            raise ValueError(f"{self.pairs[i][1]}: label {self.describe(strange[0])} is no class: {self.known()}")
        image, labels = to_tensor(image.image, self.channels), torch.from_numpy(np.asarray(labels, np.int64))
        return self.transform(image, labels) if self.transform else (image, labels)

    def known(self) -> str:
        """Which labels there are, for messages."""
        K = len(self.classes)
        if self.colours:
            return f"label_map names {len(self.colours)} colours"
        return f"there are {K} classes (0 to {K - 1}), and {self.ignore_index} is ignored"


def _table(label_map: Mapping[int | str, int]) -> np.ndarray:
    """Lookup table of all numbers that files can have."""
    table = np.arange(LARGEST, dtype=np.int64)
    for number, target in label_map.items():
        try:
            table[_number(number)] = target
        except ValueError:
            raise ValueError(f"label_map: {number!r} is neither a number from 0 to {LARGEST - 1} nor #rrggbb") from None
    return table


def _number(key: int | str) -> int:
    number = int(key)
    if not 0 <= number < LARGEST:
        raise ValueError(key)
    return number
