"""Pictures: colours for classes, overlays with a legend, image beside truth beside prediction."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

VOID = (0, 0, 0)  # ignored pixels
ROW, SWATCH, GAP = 20, 14, 8  # of legends, in pixels


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
    table = np.vstack([palette(num_classes), VOID]).astype(np.uint8)
    labels = labels.astype(np.int64)
    return table[np.where((labels >= 0) & (labels < num_classes), labels, num_classes)]


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
    return _with_legend(picture, _occurring([labels], class_names), len(class_names))


def comparison(
    rows: Sequence[tuple[Image.Image, np.ndarray, np.ndarray]],  # image, truth [H, W], prediction [H, W]
    class_names: Sequence[str],
    scale: int = 1,
) -> Image.Image:
    """One row a sample: image, truth, prediction; headings above, legend beside."""
    K = len(class_names)
    width, height = (n * scale for n in rows[0][0].size)
    canvas = Image.new("RGB", (3 * width + 2 * GAP, ROW + len(rows) * (height + GAP) - GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for column, heading in enumerate(("image", "truth", "prediction")):
        draw.text((column * (width + GAP) + 2, 2), heading, fill="black", font=font)
    for r, (image, truth, predicted) in enumerate(rows):
        pictures = (image.convert("RGB"), *(Image.fromarray(colourise(labels, K)) for labels in (truth, predicted)))
        for column, picture in enumerate(pictures):
            method = Image.Resampling.NEAREST if column else Image.Resampling.BICUBIC
            canvas.paste(picture.resize((width, height), method), (column * (width + GAP), ROW + r * (height + GAP)))
    names = _occurring([labels for _, *both in rows for labels in both], class_names)
    return _with_legend(canvas, names, K)


def _occurring(maps: Sequence[np.ndarray], class_names: Sequence[str]) -> list[tuple[int, str]]:
    """(class number, name) of the classes in any of the maps; number K stands for ignored pixels."""
    K = len(class_names)
    found = set().union(*(np.unique(labels).tolist() for labels in maps))
    names = [(i, class_names[i]) for i in sorted(found) if 0 <= i < K]
    return names + ([(K, "ignored")] if any(not 0 <= i < K for i in found) else [])


def _with_legend(picture: Image.Image, names: list[tuple[int, str]], num_classes: int) -> Image.Image:
    """The picture with a column of colours and names to its right."""
    font = ImageFont.load_default(13)
    colours = np.vstack([palette(num_classes), VOID])
    text = max((font.getlength(name) for _, name in names), default=0)
    width = int(text) + SWATCH + 3 * GAP
    columns = -(-len(names) * ROW // max(picture.height - GAP, ROW))
    canvas = Image.new("RGB", (picture.width + columns * width, picture.height), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    per_column = -(-len(names) // max(columns, 1))
    for i, (number, name) in enumerate(names):
        left = picture.width + GAP + i // per_column * width
        top = GAP // 2 + i % per_column * ROW
        draw.rectangle(
            (left, top, left + SWATCH, top + SWATCH), fill=tuple(int(c) for c in colours[number]), outline="black"
        )
        draw.text((left + SWATCH + GAP, top - 1), name, fill="black", font=font)
    return canvas
