"""The page that shows an Explanation: panels over the image, rows of class masks, and the scores of a pixel."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from segvit.explanation import EDGE, EVEN, Explanation, Ranked
from segvit.visualize import GAP, ROW, SWATCH, colourise, fit_size, occurring, palette, text_font, with_legend

SHADES = np.array([(12, 8, 38), (84, 18, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])  # of 0 to 1, evenly
EVEN_COLOUR, EDGE_COLOUR = (70, 200, 255), (255, 70, 30)
BAR, BAR_BACK, GREY = (45, 105, 185), (226, 228, 232), (110, 110, 110)
LETTERS = 13  # text size, in pixels, of panels up to GROWS wide; it grows with wider ones
GROWS = 400
LEAST_CELL = 168  # so that a caption fits under a narrow panel
RANKED = 5  # classes of a pixel
RIVALS = 2  # of them, the ones whose masks are shown in any case


class Style:
    """Fonts and distances of one page."""

    def __init__(self, scale: float):
        self.scale = scale
        self.row, self.swatch, self.gap, self.bar = (round(n * scale) for n in (ROW, SWATCH, GAP, 5))
        self.font = text_font(LETTERS * scale)
        self.title = text_font(1.25 * LETTERS * scale)

    def wrapped(self, text: str, width: int, font=None) -> list[str]:
        """Lines no wider than `width`; words that are wider are broken."""
        font, lines, line = font or self.font, [], ""
        for word in text.split():
            if line and font.getlength(f"{line} {word}") <= width:
                line = f"{line} {word}"
                continue
            lines += [line] if line else []
            while len(word) > 1 and font.getlength(word) > width:
                fits = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
                lines.append(word[:fits])
                word = word[fits:]
            line = word
        return [*lines, line] if line else lines

    def text(self, text: str, width: int, colour=None, large: bool = False, grey: bool = False) -> Image.Image:
        """A block of wrapped text, with a swatch of the colour before it."""
        font, left = self.title if large else self.font, 0 if colour is None else self.swatch + self.gap
        lines, row = self.wrapped(text, width - left, font), round(self.row * (1.25 if large else 1))
        canvas = Image.new("RGB", (width, row * len(lines)), "white")
        pen = ImageDraw.Draw(canvas)
        if colour is not None:
            top = (row - self.swatch) // 2
            pen.rectangle((0, top, self.swatch, top + self.swatch), fill=colour, outline="black")
        for i, line in enumerate(lines):
            pen.text((left, (i + 0.5) * row), line, fill=GREY if grey else "black", font=font, anchor="lm")
        return canvas

    def cell(self, panel: Image.Image, captions: Sequence[tuple], share: float | None) -> Image.Image:
        """A panel over a bar as long as the share (where there is one), over captions: text, colour of a swatch."""
        width = max(panel.width, round(LEAST_CELL * self.scale))
        parts = [panel]
        if share is not None:
            bar = Image.new("RGB", (width, self.bar), BAR_BACK)
            bar.paste(BAR, (0, 0, round(share * width), self.bar))
            parts.append(bar)
        return stacked([*parts, *(self.text(text, width, colour) for text, colour in captions)], self.bar)


def stacked(parts: Sequence[Image.Image], gap: int) -> Image.Image:
    """Pictures above each other."""
    canvas = Image.new("RGB", (max(p.width for p in parts), sum(p.height + gap for p in parts) - gap), "white")
    top = 0
    for part in parts:
        canvas.paste(part, (0, top))
        top += part.height + gap
    return canvas


def beside(parts: Sequence[Image.Image], gap: int) -> Image.Image:
    """Pictures side by side."""
    canvas = Image.new("RGB", (sum(p.width + gap for p in parts) - gap, max(p.height for p in parts)), "white")
    left = 0
    for part in parts:
        canvas.paste(part, (left, 0))
        left += part.width + gap
    return canvas


def heat(values: np.ndarray, grey: Image.Image) -> Image.Image:  # [h, w] of 0 to 1
    """Values as shades over a grey image of their size: the larger, the brighter and the less transparent."""
    values = np.nan_to_num(values).clip(0, 1)[..., None]
    stops = np.linspace(0, 1, len(SHADES))
    colours = np.concatenate([np.interp(values, stops, channel) for channel in SHADES.T], -1)
    opacity = 0.6 + 0.3 * values
    return Image.fromarray(((1 - opacity) * np.asarray(grey, float) + opacity * colours).round().astype(np.uint8))


def draw(explanation: Explanation, side: int, point: tuple[int, int] | None, note: str) -> Image.Image:
    """The page of Explanation.picture."""
    e, K = explanation, len(explanation.class_names)
    size = fit_size(e.image.size, side)
    style = Style(max(1.0, side / GROWS))
    image = e.image.resize(size, Image.Resampling.BICUBIC)
    grey = image.convert("L").convert("RGB")

    def panel(picture: Image.Image, *captions, share: float | None = None) -> Image.Image:
        if point is not None:
            _mark(picture, point, e.labels.shape, style.scale)
        return style.cell(picture, [c if isinstance(c, tuple) else (c, None) for c in captions], share)

    header = [panel(image.copy(), "image"), panel(_prediction(e, size), "prediction")]
    hesitation = heat(_hesitation(e, size), grey)
    header.append(panel(hesitation, "hesitation: dark where sure, bright where two classes are close"))
    if e.kept is not None:
        header.append(panel(_tokens(e, grey), *_token_captions(e)))
    ranked = [] if point is None else e.ranking(*point)[:RANKED]
    shown = [r.number for r in ranked[:RIVALS] if r.number not in e.shown] + e.shown
    rows = [
        [panel(heat(values, grey), *said, share=share) for values, said, share in _stages(e, k, size)] for k in shown
    ]
    header, *rows = (beside(cells, style.gap) for cells in (header, *rows))
    width = max(part.width for part in (header, *rows))
    title = [style.text(_heading(e), width, large=True), *([style.text(note, width)] if note else [])]
    parts = [stacked(title, style.bar), header, _key(style, width)]
    colours = [tuple(colour) for colour in palette(K).tolist()]
    share = torch.bincount(e.labels.flatten().clamp(min=0).long(), minlength=K)[:K] / e.labels.numel()
    for k, row in zip(shown, rows):
        name = f"{e.class_names[k]}: {_percent(share[k].item())} of the pixels"
        parts.append(stacked([style.text(name, width, colours[k], large=True), row], style.bar))
    if point is not None:
        top, left = (e.window or (0, 0))[:2]
        parts.append(_ranking(ranked, (point[0] + top, point[1] + left), style, width, colours))
    page = stacked(parts, 2 * style.gap)
    legend = occurring([e.labels.numpy()], e.class_names)
    framed = Image.new("RGB", (page.width + 2 * style.gap, page.height + 2 * style.gap), "white")
    framed.paste(page, (style.gap, style.gap))
    return with_legend(framed, legend, K, style.scale)


def _percent(share: float) -> str:
    return "none" if share == 0 else "< 0.1 %" if share < 0.001 else f"{100 * share:.1f} %"


def _heading(e: Explanation) -> str:
    (H, W), (height, width) = e.labels.shape, e.seen
    resized = "" if (height, width) == (H, W) else f" (resized from {W}x{H})"
    what = "the whole image" if e.window is None else f"a window at x {e.window[1]}, y {e.window[0]}"
    return f"What the model makes of {what}, at {width}x{height} pixels{resized}"


def _stages(e: Explanation, k: int, size: tuple[int, int]) -> list[tuple[np.ndarray, list[str], float | None]]:
    """Values, captions and bar of each panel of a class."""
    confidence, nothing = e.confidence[:, k].tolist(), e.no_object[:, k].tolist()
    masks = [e.mask(stage, k, size[::-1]).numpy() for stage in range(len(confidence))]
    rows = [
        (mask, [f"stage {i}: confidence {p:.2f}", f"no object {n:.2f}"], p)
        for i, (mask, p, n) in enumerate(zip(masks, confidence, nothing), 1)
    ]
    product = confidence[-1] * masks[-1]
    return [*rows, (product, ["confidence · mask", f"at most {product.max():.2f}"], confidence[-1])]


def _prediction(e: Explanation, size: tuple[int, int]) -> Image.Image:
    rows, columns = (((np.arange(n) + 0.5) * N / n).astype(int) for n, N in zip(size[::-1], e.labels.shape))
    return Image.fromarray(colourise(e.labels.numpy()[np.ix_(rows, columns)], len(e.class_names)))


def _hesitation(e: Explanation, size: tuple[int, int]) -> np.ndarray:
    """[h, w]: one minus the distance of the best score from the second."""
    best = e.scores(size[::-1]).topk(min(2, len(e.class_names)), 0).values
    return (1 - (best[0] - best[1] if len(best) > 1 else best[0])).numpy()


def _tokens(e: Explanation, grey: Image.Image) -> Image.Image:
    """Dots where tokens of the even grid stay, squares where edge tokens do."""
    picture = Image.blend(grey, Image.new("RGB", grey.size, "black"), 0.35)
    pen = ImageDraw.Draw(picture)
    across, down = picture.width / e.extent[1], picture.height / e.extent[0]
    for y, x in e.kept.nonzero().tolist():
        edge = e.kept[y, x] == EDGE
        r = (0.42 if edge else 0.2) * min(across, down)
        cx, cy = (x + 0.5) * across, (y + 0.5) * down
        (pen.rectangle if edge else pen.ellipse)((cx - r, cy - r, cx + r, cy + r), EDGE_COLOUR if edge else EVEN_COLOUR)
    return picture


def _token_captions(e: Explanation) -> list[tuple[str, tuple]]:
    counts = [int((e.kept == kind).sum()) for kind in (EVEN, EDGE)]
    captions = [(f"{counts[0]} of {e.kept.numel()} tokens stay: the even grid", EVEN_COLOUR)]
    return captions + ([(f"{counts[1]} more, likely at edges", EDGE_COLOUR)] if e.edges is not None else [])


def _mark(panel: Image.Image, point: tuple[int, int], size: Sequence[int], scale: float) -> None:
    """A circle around a pixel (row, column) of an image of size (height, width)."""
    pen = ImageDraw.Draw(panel)
    y, x = ((i + 0.5) * shown / side for i, shown, side in zip(point, panel.size[::-1], size))
    for radius, colour, width in ((9, "black", 4), (8, "white", 2)):
        r = radius * scale
        pen.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=round(width * scale))


def _key(style: Style, width: int) -> Image.Image:
    """What the rows below show, and the shades."""
    ramp = np.tile(np.linspace(0, 1, round(120 * style.scale)), (style.swatch, 1))
    bar = heat(ramp, Image.new("RGB", ramp.shape[::-1], (128, 128, 128)))
    text = (
        "Masks of the class tokens, from 0 (dark) to 1 (bright). The bar is the confidence: how probable the token "
        "finds its class; the last stage decides. A pixel goes to the class with the largest score: its token's "
        "confidence · mask, and what other tokens give it."
    )
    return stacked([bar, style.text(text, width, grey=True)], style.bar)


def _ranking(
    ranked: list[Ranked], point: tuple[int, int], style: Style, width: int, colours: list[tuple]
) -> Image.Image:
    """The best classes of a pixel as a table, numbers first, as names may be long."""
    y, x = point
    column = round(90 * style.scale)

    def line(cells: Sequence[str], name: str, colour: tuple | None, grey: bool = False) -> Image.Image:
        numbers = [style.text(cell, column, grey=grey) for cell in cells]
        return beside([*numbers, style.text(name, width - 3 * (column + style.gap), colour, grey=grey)], style.gap)

    title = f"Pixel x {x}, y {y} (the circle)"
    lines = [style.text(title, width, large=True), line(("confidence", "mask", "score"), "class", None, grey=True)]
    lines += [line([f"{v:.3f}" for v in (r.confidence, r.mask, r.score)], r.name, colours[r.number]) for r in ranked]
    return stacked(lines, 0)
