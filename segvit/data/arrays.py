"""Images that Pillow does not hold: .npy and multi-band TIFF files, 16-bit and float values, any number of channels."""

import logging
import threading
from pathlib import Path

import numpy as np
from PIL import Image

ARRAY_EXTENSIONS = (".npy",)
TIFF_EXTENSIONS = (".tif", ".tiff")
FULL = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}  # what integers are divided by
PARSER = threading.Lock()  # np.load reads headers with Python's own parser, which fails in threads of Python 3.11
logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what it cannot read, one error of ours says


def is_array_file(path: str | Path, channels: int) -> bool:
    """Whether read_array reads an image file. All others are Pillow's, among them TIFF files of 8-bit grey or RGB."""
    suffix = Path(path).suffix.lower()
    if suffix in ARRAY_EXTENSIONS:
        return True
    if suffix not in TIFF_EXTENSIONS or not Path(path).is_file():
        return False
    try:
        with Image.open(path) as page:
            if page.format != "TIFF":
                return False
            bits, samples = page.tag_v2.get(258, (1,)), page.tag_v2.get(277, 1)  # BitsPerSample, SamplesPerPixel
            stacked = page.mode == "L" and page.n_frames > 1  # a page a band
            return channels not in (1, 3) or max(bits) > 8 or samples > 4 or stacked
    except Exception:  # damaged: read_array will say how
        return True


def read_array(path: str | Path, channels: int) -> tuple[np.ndarray, str]:
    """An image [H, W, C] of a .npy or TIFF file, uint8, uint16 or float32; and what is stored, such as "uint16 x 7".

    The axis of `channels` entries is that of the channels, the first or the last; one channel also serves where three
    are wanted.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a readable file, another number of channels, or values without one meaning.
        RuntimeError: tifffile is needed and not there.
    """
    stored = _read_npy(path) if Path(path).suffix.lower() in ARRAY_EXTENSIONS else _read_tiff(path)
    array = _bands_last(stored, channels, path)
    return as_values(array, path), f"{stored.dtype.name} x {array.shape[2]}"


def as_values(array: np.ndarray, name: str | Path) -> np.ndarray:
    """The same pixels as uint8, uint16 or float32, in this machine's byte order.

    Raises ValueError, with `name` before it, for other dtypes, negative integers, and floats that are not finite.
    """
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind == "u" and size <= 2:
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    if kind == "i" and size == 2:
        if array.min() < 0:
            raise ValueError(f"{name}: int16 with values down to {array.min()}; save it as floats, or as uint16")
        return array.astype(np.uint16)
    if kind != "f" or size > 8:
        raise ValueError(f"{name}: values are {array.dtype.name}; save them as uint8, uint16 or floats")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is named below
        array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: NaN or infinity among its values; replace them first")
    return array


def scaled(array: np.ndarray) -> np.ndarray:
    """float32 values as a model's mean and std count them: integers over the largest of their kind, floats as they are.

    uint8 / 255, uint16 / 65535.
    """
    values = array.astype(np.float32, copy=False)
    return values / np.float32(FULL[array.dtype]) if array.dtype in FULL else values


def _read_npy(path: str | Path) -> np.ndarray:
    try:
        with PARSER:
            array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except Exception as error:  # a damaged header raises what Python's parser meets
        raise ValueError(f"{path}: not a readable .npy file ({error})") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: an archive of arrays (.npz); save one array a file")
    return array


def _read_tiff(path: str | Path) -> np.ndarray:
    try:
        from tifffile import imread
    except ImportError:
        raise RuntimeError(
            f"{path}: TIFF files of other than 8-bit grey or RGB need tifffile: pip install tifffile"
        ) from None
    try:
        return np.asarray(imread(path))
    except Exception as error:  # tifffile raises what its parser meets
        hint = "; pip install imagecodecs" if "imagecodecs" in str(error) else ""
        raise ValueError(f"{path}: not a readable TIFF file ({error}){hint}") from error


def _bands_last(array: np.ndarray, channels: int, path: str | Path) -> np.ndarray:
    """[H, W, C] of an array that may have its channels first, or none."""
    shape = tuple(array.shape)
    if array.ndim not in (2, 3) or 0 in shape:
        raise ValueError(f"{path}: an image is [H, W], [H, W, C] or [C, H, W], this array has the shape {shape}")
    if array.ndim == 2 and channels in (1, 3):
        return array[:, :, None]
    for count in (channels, 1) if array.ndim == 3 and channels == 3 else (channels,):
        first, last = (array.ndim == 3 and shape[axis] == count for axis in (0, -1))
        if first and last:
            raise ValueError(f"{path}: the shape {shape} may be [H, W, C] or [C, H, W]; save it with other sizes")
        if first or last:
            return array if last else np.moveaxis(array, 0, 2)
    raise ValueError(
        f"{path}: the shape {shape} does not fit {channels} channels, as [H, W, C] or [C, H, W]; "
        "--channels of check-data and train says how many there are"
    )
