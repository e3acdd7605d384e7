"""A folder of images and label maps as a data set."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from segvit.data.images import EXTENSIONS, read_image, read_labels, to_tensor

LABEL_FOLDERS = ("labels", "masks", "annotations")
LABEL_EXTENSIONS = tuple(ending for ending in EXTENSIONS if ending not in (".jpg", ".jpeg"))  # JPEG changes numbers


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


class SegmentationFolder(Dataset):
    """Images in ROOT/images with label maps of the same stem in ROOT/labels (or masks, or annotations).

    A label map has one channel of class numbers, 0 to K−1 in the order of `classes`, and ignore_index elsewhere.

    Args:
        root: the folder.
        classes: K class names.
        ignore_index: label of pixels without a truth.
        transform: called with image uint8 [C, H, W] and labels int64 [H, W]; returns both.
        channels: 3 (RGB) or 1 (grey).

    Raises (at once, or for a sample when it is read):
        FileNotFoundError: a folder or a label map that is not there, named.
        ValueError: no images; a label map of another size; a label that is no class, named with its file.
    """

    def __init__(
        self,
        root: str | Path,
        classes: Sequence[str],
        ignore_index: int = 255,
        transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        channels: int = 3,
    ):
        self.root, self.classes, self.ignore_index = Path(root), list(classes), ignore_index
        self.transform, self.channels = transform, channels
        if 0 <= ignore_index < len(self.classes):
            name = self.classes[ignore_index]
            raise ValueError(f"ignore_index {ignore_index} is the number of the class {name!r}; choose another")
        folder = self.root / "images"
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; a data set has images/ and labels/")
        labels = next((self.root / name for name in LABEL_FOLDERS if (self.root / name).is_dir()), None)
        if labels is None:
            raise FileNotFoundError(f"{self.root}: no folder of label maps ({', '.join(LABEL_FOLDERS)})")
        self.images = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)
        if not self.images:
            raise ValueError(f"{folder}: no images ({', '.join(EXTENSIONS)})")
        stems = [path.stem for path in self.images]
        twice = sorted({stem for stem in stems if stems.count(stem) > 1}) if len(set(stems)) < len(stems) else []
        if twice:
            raise ValueError(f"{folder}: several images are called {twice[0]}; which one does the label map belong to?")
        by_stem = {path.stem: path for path in labels.iterdir() if path.suffix.lower() in LABEL_EXTENSIONS}
        missing = [path.name for path in self.images if path.stem not in by_stem]
        if missing:
            kinds = f"{len(missing)} of {len(self.images)} images have no label map ({', '.join(LABEL_EXTENSIONS)})"
            raise FileNotFoundError(f"{labels}: {kinds}, first {missing[0]}")
        self.labels = [by_stem[path.stem] for path in self.images]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image = to_tensor(read_image(self.images[i], self.channels), self.channels)
        labels = torch.from_numpy(read_labels(self.labels[i])).long()
        if image.shape[1:] != labels.shape:
            raise ValueError(
                f"{self.labels[i]}: the label map is {tuple(labels.shape)}, its image {tuple(image.shape[1:])}"
            )
        strange = labels[((labels < 0) | (labels >= len(self.classes))) & (labels != self.ignore_index)]
        if len(strange):
            raise ValueError(
                f"{self.labels[i]}: label {strange[0].item()} is no class: there are {len(self.classes)} classes "
                f"(0 to {len(self.classes) - 1}), and {self.ignore_index} is ignored"
            )
        return self.transform(image, labels) if self.transform else (image, labels)
