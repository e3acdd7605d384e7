"""Image and label files, in and out of tensors."""

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
LABEL_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff", ".webp", ".mat")  # JPEG changes numbers
MODES = {1: "L", 3: "RGB"}


def open_image(path: str | Path) -> Image.Image:
    """A fully read image file, as it is stored.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a readable image.
    """
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "no image, or a damaged one" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{path}: not a readable image ({reason})") from error
    return image


def read_image(path: str | Path, channels: int = 3) -> Image.Image:
    """An image file, turned as its EXIF says, as RGB (3 channels) or grey (1).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a readable image, or channels that image files do not have.
    """
    return upright(open_image(path), path, channels)


def upright(image: Image.Image, path: str | Path, channels: int = 3) -> Image.Image:
    """What read_image makes of a stored image."""
    if channels not in MODES:
        raise ValueError(f"{path}: image files give 1 or 3 channels, the model takes {channels}; pass tensors")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{path}: the image has mode {image.mode}, 16 or 32 bits a pixel; convert it to 8 bits first")
    return ImageOps.exif_transpose(image).convert(MODES[channels])


def read_labels(path: str | Path, colours: bool = False) -> np.ndarray:
    """A label file [H, W], uint8 or int32.

    Numbers are the index of an indexed PNG, the grey value, or the matrix S of a MATLAB file (which needs SciPy). With
    `colours`, numbers are 65536·red + 256·green + blue of the picture's colours.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a readable image, or one with colours, whose classes nobody can know.
        RuntimeError: SciPy is needed and not there.
    """
    if Path(path).suffix.lower() == ".mat":
        return _read_mat(path)
    image = open_image(path)
    if colours:
        red, green, blue = np.moveaxis(np.array(image.convert("RGB"), np.int32), 2, 0)
        return red << 16 | green << 8 | blue
    if image.mode not in ("L", "P", "1", "I") and not image.mode.startswith("I;16"):
        raise ValueError(
            f"{path}: a label image has one channel of class numbers, this one has mode {image.mode}; "
            'if its colours mean classes, name them in label_map ({"#804080": 0, …})'
        )
    labels = np.array(image)
    return labels if labels.dtype == np.uint8 else labels.astype(np.int32)


def _read_mat(path: str | Path) -> np.ndarray:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise RuntimeError(f"{path}: reading MATLAB files needs SciPy: pip install scipy") from None
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return np.ascontiguousarray(loadmat(path, variable_names=["S"])["S"]).astype(np.int32)
    except Exception as error:  # SciPy raises what its parser meets
        raise ValueError(f"{path}: no MATLAB file with a label matrix S ({error})") from error


def parse_colour(text: str) -> int:
    """65536·red + 256·green + blue of "#rrggbb"."""
    if not re.fullmatch("#[0-9a-fA-F]{6}", text):
        raise ValueError(f'label_map: {text!r} is no colour; write it as "#rrggbb"')
    return int(text[1:], 16)


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
    return torch.from_numpy(np.array(array.transpose(2, 0, 1), order="C"))
