"""Image and label files, in and out of tensors."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MODES = {1: "L", 3: "RGB"}


def _open(path: str | Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error
    return image


def read_image(path: str | Path, channels: int = 3) -> Image.Image:
    """An image file, turned as its EXIF says, as RGB (3 channels) or grey (1).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a readable image, or channels that image files do not have.
    """
    if channels not in MODES:
        raise ValueError(f"{path}: image files give 1 or 3 channels, the model takes {channels}; pass tensors")
    image = _open(path)
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{path}: the image has mode {image.mode}, 16 or 32 bits a pixel; convert it to 8 bits first")
    return ImageOps.exif_transpose(image).convert(MODES[channels])


def read_labels(path: str | Path) -> np.ndarray:
    """A label file [H, W]: the index of an indexed PNG, or the grey value; uint8 or int32.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a readable image, or one with colours, whose classes nobody can know.
    """
    image = _open(path)
    if image.mode not in ("L", "P", "1", "I", "I;16"):
        raise ValueError(f"{path}: a label image has one channel of class numbers, this one has mode {image.mode}")
    labels = np.array(image)
    return labels if labels.dtype == np.uint8 else labels.astype(np.int32)


def to_tensor(image: Image.Image | np.ndarray, channels: int = 3) -> Tensor:
    """uint8 [C, H, W] of a PIL image or an array [H, W] or [H, W, C]."""
    if isinstance(image, Image.Image) and channels in MODES:
        image = ImageOps.exif_transpose(image).convert(MODES[channels])
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise ValueError(f"images: an array must be uint8 [H, W, C] or [H, W], got {array.dtype} {array.shape}")
    array = array[:, :, None] if array.ndim == 2 else array
    if array.shape[2] == 1 and channels == 3:
        array = array.repeat(3, 2)
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
