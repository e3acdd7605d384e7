"""Pictures: colours for classes, overlays with a legend, image beside truth beside prediction, and errors."""

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

VOID = (0, 0, 0)  # ignored pixels
WRONG = (230, 25, 45)  # pixels where truth and prediction differ
ROW, SWATCH, GAP = 20, 14, 8  # of legends, in pixels
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "arial.ttf", "Arial.ttf", "Helvetica.ttc")  # the first that is there
LEAST_ROWS = 12  # of a legend, even beside a picture that is less high


def palette(num_classes: int) -> np.ndarray:  # [K, 3] uint8
    """Colours that differ as much as K colours can: hues by the golden ratio, three levels of lightness in turn."""
    i = np.arange(num_classes)
    hue, value = (0.02 + i * 0.618034) % 1.0, np.array([0.95, 0.7, 0.5])[i % 3]
    saturation = np.array([0.75, 0.6, 0.9])[(i // 3) % 3]
    channel = (np.array([5, 3, 1])[None] + hue[:, None] * 6) % 6
    rgb = value[:, None] * (1 - saturation[:, None] * np.clip(np.minimum(channel, 4 - channel), 0, 1))
    return (rgb * 255).round().astype(np.uint8)


def colourise(labels: np.ndarray, num_classes: int) -> np.ndarray:  # [H, W] -> [H, W, 3] uint8
    """Class colours; black where a label is no class."""
    table = np.vstack([palette(num_classes), np.tile(VOID, (max(256 - num_classes, 1), 1))]).astype(np.uint8)
    if labels.dtype != np.uint8 or num_classes > 256:
        labels = np.where((labels >= 0) & (labels < num_classes), labels, num_classes)
    return table[labels]


def picture(image: np.ndarray) -> Image.Image:  # [C, H, W] of any type
    """The first three channels as RGB, or the first as grey; what is not uint8 is stretched over 0 to 255."""
    shown = image[:3] if len(image) > 2 else image[:1].repeat(3, 0)
    if shown.dtype != np.uint8:
        shown = shown.astype(np.float32)
        known = np.isfinite(shown)
        low, high = (shown[known].min(), shown[known].max()) if known.any() else (0, 0)
        share = (np.where(known, shown, low) - low) / (high - low if high > low else 1)
        shown = (share * 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(shown.transpose(1, 2, 0)))


def mistakes(image: Image.Image, wrong: np.ndarray) -> Image.Image:  # [H, W] bool, of any size
    """The image in pale grey, and in red where it is wrong; thin errors of a large map stay visible."""
    pale = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "white"), 0.35)
    share = Image.fromarray(wrong.astype(np.uint8) * 255).resize(image.size, Image.Resampling.BOX)
    return Image.composite(Image.new("RGB", image.size, WRONG), pale, share)


@functools.cache
def text_font(size: float) -> ImageFont.FreeTypeFont:
    """A font of the system that knows more letters than Pillow's own, which has little beyond ASCII; else that one."""
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def fit_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) whose longer side is `side`."""
    scale = side / max(size)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def label_image(labels: np.ndarray, num_classes: int) -> Image.Image:
    """Class numbers as a PNG that viewers show in colour: indexed up to 256 classes, else 16-bit grey."""
    if num_classes > 256:
        return Image.fromarray(labels.astype(np.uint16))
    image = Image.fromarray(labels.astype(np.uint8), "P")
    image.putpalette(np.vstack([palette(num_classes), np.zeros((256 - num_classes, 3), np.uint8)]).tobytes())
    return image


def overlay(image: Image.Image, labels: np.ndarray, class_names: Sequence[str], opacity: float = 0.55) -> Image.Image:
    """The image under its class colours, with a legend of the classes that occur."""
    colours = Image.fromarray(colourise(labels, len(class_names)))
    picture = Image.blend(image.convert("RGB"), colours, opacity)
    return with_legend(picture, occurring([labels], class_names), len(class_names))


def comparison(
    rows: Sequence[tuple[Image.Image, ...]],  # image, then label maps [H, W]: truth, or truth and prediction
    class_names: Sequence[str],
    side: int,
) -> Image.Image:
    """One row a sample: image, truth and, if given, prediction, at most `side` pixels wide and high; with a legend."""
    K = len(class_names)
    sizes = [fit_size(image.size, side) for image, *_ in rows]
    width, columns = max(w for w, _ in sizes), len(rows[0])
    tops = np.cumsum([ROW, *(height + GAP for _, height in sizes)])
    canvas = Image.new("RGB", (columns * (width + GAP) - GAP, int(tops[-1]) - GAP), "white")
    draw, font = ImageDraw.Draw(canvas), text_font(13)
    for column, heading in zip(range(columns), ("image", "truth", "prediction")):
        draw.text((column * (width + GAP) + 2, 2), heading, fill="black", font=font)
    for top, size, (image, *maps) in zip(tops.tolist(), sizes, rows):
        pictures = (image.convert("RGB"), *(Image.fromarray(colourise(labels, K)) for labels in maps))
        for column, picture in enumerate(pictures):
            method = Image.Resampling.NEAREST if column else Image.Resampling.BICUBIC
            canvas.paste(picture.resize(size, method), (column * (width + GAP), top))
    return with_legend(canvas, occurring([labels for _, *maps in rows for labels in maps], class_names), K)


def occurring(maps: Sequence[np.ndarray], class_names: Sequence[str]) -> list[tuple[int, str]]:
    """(class number, name) of the classes in any of the maps; number K stands for ignored pixels."""
    K = len(class_names)
    found = set().union(*(np.unique(labels).tolist() for labels in maps))
    names = [(i, class_names[i]) for i in sorted(found) if 0 <= i < K]
    return names + ([(K, "ignored")] if any(not 0 <= i < K for i in found) else [])


def with_legend(
    picture: Image.Image, names: list[tuple[int, str]], num_classes: int, scale: float | None = None
) -> Image.Image:
    """The picture with colours and names to its right, in as many columns as need be, in letters that grow with it."""
    scale = max(1.0, min(picture.size) / 800) if scale is None else scale
    row, swatch, gap = (round(n * scale) for n in (ROW, SWATCH, GAP))
    font = text_font(13 * scale)
    colours = np.vstack([palette(num_classes), VOID])
    text = max((font.getlength(name) for _, name in names), default=0)
    width = int(text) + swatch + 3 * gap
    per_column = max((picture.height - gap) // row, min(len(names), LEAST_ROWS))
    columns = -(-len(names) // max(per_column, 1))
    height = max(picture.height, gap + row * min(len(names), per_column))
    canvas = Image.new("RGB", (picture.width + columns * width, height), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for i, (number, name) in enumerate(names):
        left = picture.width + gap + i // per_column * width
        top = gap // 2 + i % per_column * row
        fill = tuple(int(c) for c in colours[number])
        draw.rectangle((left, top, left + swatch, top + swatch), fill=fill, outline="black")
        draw.text((left + swatch + gap, top - 1), name, fill="black", font=font)
    return canvas
