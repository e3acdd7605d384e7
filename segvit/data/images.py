"""Image and label files, in and out of tensors."""

import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from segvit.data.arrays import ARRAY_EXTENSIONS, as_values, is_array_file, read_array, scaled

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", *ARRAY_EXTENSIONS)
LABEL_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff", ".webp", ".mat")  # JPEG changes numbers
MODES = {1: "L", 3: "RGB"}
LOOKED_AT = 2**20  # pixels of a band, at most, that tell to_picture its contrast


class ImageFile(NamedTuple):
    """An image file as it is used, and as it is stored."""

    image: Image.Image | np.ndarray  # see read_image
    kind: str  # channels as stored: Pillow's name ("RGB", "L", "RGBA" …) and whether EXIF turned it, or "uint16 x 7"
    stored: tuple[int, int]  # width and height before EXIF's rotation

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.image.size if isinstance(self.image, Image.Image) else self.image.shape[1::-1]


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
    except Exception as error:  # Pillow raises what its parsers meet
        reason = "no image, or a damaged one" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{path}: not a readable image ({reason})") from error
    return image


def read_image(path: str | Path, channels: int = 3) -> Image.Image | np.ndarray:
    """An image file, turned as its EXIF says.

    Pictures of 8 bits are PIL images, RGB (3 channels) or grey (1). A .npy file, a TIFF of more bits or bands, and a
    16-bit PNG give an array [H, W, C] of uint8, uint16 or float32.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a readable image, or other channels.
        RuntimeError: a TIFF that needs tifffile, which is not there.
    """
    return load_image(path, channels).image


def load_image(path: str | Path, channels: int = 3) -> ImageFile:
    """read_image, and what the file holds."""
    if is_array_file(path, channels):
        array, kind = read_array(path, channels)
        return ImageFile(array, kind, array.shape[1::-1])
    stored = open_image(path)
    image = _upright(stored, path, channels)
    turned = " turned by EXIF" if image.size != stored.size else ""
    sixteen = stored.mode.startswith("I;16")
    array = as_values(np.asarray(image)[:, :, None], path) if sixteen else image
    return ImageFile(array, f"{'uint16 x 1' if sixteen else stored.mode}{turned}", stored.size)


def _upright(image: Image.Image, name: str | Path, channels: int) -> Image.Image:
    """A PIL image of these channels, turned as its EXIF says; grey of 16 bits (modes that begin with I;16) stays."""
    bands = len(image.getbands())
    if channels not in MODES and channels != bands:
        raise ValueError(f"{name}: a picture of {bands} channels ({image.mode}), {channels} are wanted; see --channels")
    if image.mode in ("I", "F"):
        raise ValueError(f"{name}: the image has mode {image.mode}, 32 bits a pixel; save it as .npy or as TIFF")
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # of damaged EXIF
        raise ValueError(f"{name}: not a readable image (its EXIF: {error})") from error
    return image if image.mode.startswith("I;16") or channels not in MODES else image.convert(MODES[channels])


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
    """[C, H, W] of a PIL image or an array [H, W] or [H, W, C]: uint8, or float32 of scaled values where there are more

    than 8 bits (16-bit integers / 65535, floats as they are). One channel is repeated where three are wanted.

    Raises:
        ValueError: another shape or dtype, negative integers, or floats that are not finite.
    """
    array = np.asarray(_upright(image, "images", channels) if isinstance(image, Image.Image) else image)
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"images: an array must be [H, W, C] or [H, W], got {array.dtype} {array.shape}")
    array = as_values(array[:, :, None] if array.ndim == 2 else array, "images")
    if array.shape[2] == 1 and channels == 3:
        array = array.repeat(3, 2)
    array = array if array.dtype == np.uint8 else scaled(array)
    return torch.from_numpy(np.array(array.transpose(2, 0, 1), order="C"))


def to_picture(image: Image.Image | np.ndarray) -> Image.Image:
    """RGB to look at, of what read_image gives.

    Of an array, the first three channels (or the first), each stretched from its 2nd to its 98th percentile.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    bands = image[:, :, :3] if image.shape[2] >= 3 else image[:, :, :1].repeat(3, 2)
    return Image.fromarray(np.stack([_stretched(band) for band in np.moveaxis(bands, 2, 0)], 2))


def _stretched(band: np.ndarray) -> np.ndarray:  # [H, W] -> [H, W] uint8
    step = max(math.isqrt(band.size // LOOKED_AT), 1)
    low, high = np.percentile(band[::step, ::step], (2, 98)).astype(np.float32)
    width = high - low if high > low else np.float32(1)
    return (((band.astype(np.float32) - low) / width).clip(0, 1) * 255).round().astype(np.uint8)
