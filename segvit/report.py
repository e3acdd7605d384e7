"""An evaluation as one HTML file: scores, confusions, and the images that came out worst and best."""

import base64
import bisect
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import segvit
from segvit.checkpoints import check_writable
from segvit.metrics import ConfusionMatrix, Scores
from segvit.visualize import VOID, WRONG, colourise, fit_size, mistakes, palette, picture

SHOWN = 6  # of the worst images, and of the best
SIDE = 480  # of pictures, in pixels
CONFUSIONS = 20  # that are listed
NUMBERED = 30  # classes up to which every cell of the confusion matrix has a number
LEAST_SHARE = 0.005  # of a row that the heat map of more classes draws
CELLS = 24  # a side of the grid that the largest mistake is looked for in
CELL = 6  # of that heat map, in pixels
MARK = '<meta name="generator" content="segvit">'  # tells a report, which may be written over, from other files
HEADINGS = ("image", "truth", "prediction", "differences")


class Confusion(NamedTuple):
    """Pixels of one class that were taken for another."""

    truth: int
    predicted: int  # K: no class
    share: float  # of the truth's pixels
    pixels: int


def largest_confusions(counts: np.ndarray, most: int) -> list[Confusion]:  # counts [K, K + 1]
    """Off-diagonal cells of a confusion matrix, by pixels; the first of equals first."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    cells = zip(*(index.tolist() for index in np.unravel_index(order, wrong.shape)))
    return [Confusion(t, p, wrong[t, p] / counts[t].sum(), int(wrong[t, p])) for t, p in cells if wrong[t, p]]


@dataclass(frozen=True)
class Example:
    """One image of a report."""

    name: str
    miou: float
    confusions: list[Confusion]
    pictures: list[bytes]  # files, one a heading
    mistake: tuple[int, int] | None = None  # row and column of a pixel in its largest mistake; None: none


class Collector:
    """Keeps the images that came out worst and best: small pictures of a constant number of them.

    An image's score is the mean IoU over the classes that its truth or its prediction has; an image without any truth
    has none. Of equals, the later one counts as better.

    Args:
        num_classes: K.
        ignore_index: label that does not count.
        name: gives the name of sample i.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, name: Callable[[int], str] = str):
        self.num_classes, self.ignore_index, self.name = num_classes, ignore_index, name
        self.images = 0
        self._scored = 0
        self._low: list[tuple[float, int, Example]] = []  # the lowest scores, rising
        self._high: list[tuple[float, int, Example]] = []  # the highest scores, rising

    def __call__(
        self,
        i: int,
        image: Tensor,  # [C, H, W]
        labels: Tensor,  # [H, W]
        predicted: Tensor,  # [H, W]
    ) -> None:
        """The `watch` of segvit.evaluation.evaluate."""
        self.images += 1
        matrix = ConfusionMatrix(self.num_classes, self.ignore_index, labels.device)
        matrix.update(predicted, labels)
        counts = matrix.counts.cpu().numpy()
        if not counts.any():
            return
        self._scored += 1
        key = (_mean_iou(counts), self._scored)
        low = len(self._low) < SHOWN or key < self._low[-1][:2]
        high = len(self._high) < SHOWN or key > self._high[0][:2]
        if not (low or high):
            return
        maps = labels.cpu().numpy(), predicted.cpu().numpy()
        wrong = self._wrong(*maps)
        pictures = self._pictures(image, *maps, wrong)
        entry = (*key, Example(self.name(i), key[0], largest_confusions(counts, 3), pictures, middle(wrong)))
        if low:
            bisect.insort(self._low, entry)
            del self._low[SHOWN:]
        if high:
            bisect.insort(self._high, entry)
            del self._high[:-SHOWN]

    def worst(self) -> list[Example]:
        """The worst first; of few images the worse half."""
        return [example for _, _, example in self._low[: -(-self._scored // 2)]]

    def best(self) -> list[Example]:
        """The best first; of few images the better half."""
        return [example for _, _, example in self._high[::-1][: self._scored // 2]]

    def _valid(self, labels: np.ndarray) -> np.ndarray:
        return (labels >= 0) & (labels < self.num_classes) & (labels != self.ignore_index)

    def _wrong(self, labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        return self._valid(labels) & (labels != predicted)

    def _pictures(self, image: Tensor, labels: np.ndarray, predicted: np.ndarray, wrong: np.ndarray) -> list[bytes]:
        """Files of image, truth, prediction and where they differ."""
        K, valid = self.num_classes, self._valid(labels)
        image = image if image.dtype == torch.uint8 else image.float()
        shown = picture(image.cpu().numpy())
        small = shown.resize(fit_size(shown.size, SIDE), Image.Resampling.BICUBIC)
        maps = [Image.fromarray(colourise(part, K)) for part in (np.where(valid, labels, K), predicted)]
        maps = [part.resize(small.size, Image.Resampling.NEAREST) for part in maps]
        differences = mistakes(small, wrong)
        return [_file(small, "JPEG"), *(_file(part, "PNG") for part in maps), _file(differences, "JPEG")]


def middle(wrong: np.ndarray) -> tuple[int, int] | None:  # [H, W] bool
    """A pixel (row, column) of the mask where it is densest, in cells of a coarse grid; None where it is empty."""
    rows, columns = wrong.nonzero()
    if not len(rows):
        return None
    height, width = (min(CELLS, side) for side in wrong.shape)
    coarse = np.asarray(Image.fromarray(wrong.astype(np.float32)).resize((width, height), Image.Resampling.BOX))
    padded = np.pad(coarse, 1)
    dense = sum(padded[y : y + height, x : x + width] for y in range(3) for x in range(3))
    y, x = np.unravel_index(dense.argmax(), dense.shape)
    centre = ((y + 0.5) / height * wrong.shape[0], (x + 0.5) / width * wrong.shape[1])
    nearest = ((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2).argmin()
    return int(rows[nearest]), int(columns[nearest])


def _mean_iou(counts: np.ndarray) -> float:  # [K, K + 1]
    """Over the classes of truth or prediction."""
    hit = counts.diagonal()
    union = counts.sum(1) + counts.sum(0)[:-1] - hit
    return float((hit[union > 0] / union[union > 0]).mean())


def _file(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 85, "subsampling": 0} if kind == "JPEG" else {"optimize": True}))
    return file.getvalue()


def check_target(path: Path) -> None:
    """Make the folder of a report, and see that the report can be written.

    Raises:
        ValueError: a file that is no report of segvit is there already.
        PermissionError: nothing can be written there.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file for the report, such as {path / 'report.html'}")
    if path.exists() and not _is_report(path):
        raise ValueError(f"{path} is there already, is no report, and would be overwritten; choose another name")
    check_writable(path)


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return MARK.encode() in file.read(1000)


def write_report(
    path: str | Path, scores: Scores, class_names: Sequence[str], collector: Collector, title: str, meta: dict[str, str]
) -> None:
    """Write an evaluation as one HTML file that needs neither scripts nor other files.

    Args:
        path: the file.
        scores: of evaluate.
        class_names: K names.
        collector: what watched that evaluation.
        title: of the page.
        meta: what was evaluated, name and value a line.
    """
    counts = np.array(scores.confusion, np.int64)
    parts = [
        _head(title),
        _headline(scores, collector.images),
        _section("What was evaluated", _meta(meta)),
        _section("Classes", _class_table(scores, class_names)),
        _section("Confusion", _confusion(counts, class_names)),
        _section("Largest confusions, by pixels", _confusion_table(counts, class_names)),
        _section("Colours", _legend(class_names)),
        _section("Worst images", _examples(collector.worst(), class_names)),
        _section("Best images", _examples(collector.best(), class_names)),
        "</main></body></html>\n",
    ]
    Path(path).write_text("\n".join(parts), encoding="utf-8")


def _head(title: str) -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{MARK}
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title><style>{STYLE}</style></head>
<body><main><h1>{html.escape(title)}</h1>"""


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{heading}</h2>\n{body}</section>"


def _headline(scores: Scores, images: int) -> str:
    values = {"mIoU": f"{scores.miou:.4f}", "mAcc": f"{scores.macc:.4f}", "aAcc": f"{scores.aacc:.4f}"}
    if scores.boundary_miou is not None:
        values["boundary mIoU"] = f"{scores.boundary_miou:.4f}"
    values |= {"images": str(images), "left out": str(scores.left_out)}
    cards = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in values.items())
    return f'<div class="cards">{cards}</div>'


def _meta(meta: dict[str, str]) -> str:
    rows = {**meta, "segvit": segvit.__version__}
    return f"<dl>{''.join(f'<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>' for k, v in rows.items())}</dl>"


def _swatch(colour: Sequence[int]) -> str:
    return f'<i class="swatch" style="background:#{bytes(int(c) for c in colour).hex()}"></i>'


def _bar(value: float) -> str:
    """A fraction as a number and as a bar."""
    if value != value:
        return "<td>–</td>"
    return f'<td class="bar"><span>{value:.3f}</span><i><b style="width:{100 * value:.1f}%"></b></i></td>'


def _class_table(scores: Scores, class_names: Sequence[str]) -> str:
    columns = {"IoU": scores.iou, "accuracy": scores.acc}
    columns |= {} if scores.boundary_iou is None else {"boundary IoU": scores.boundary_iou}
    heads = "".join(f"<th>{name}</th>" for name in ("class", *columns, "share of pixels"))
    rows, total = [], max(sum(scores.pixels), 1)
    for name, colour, pixels, *values in zip(class_names, palette(len(class_names)), scores.pixels, *columns.values()):
        share = f'<td title="{pixels} pixels">{100 * pixels / total:.2f} %</td>'
        cells = "".join(_bar(value) for value in values) + share
        rows.append(f'<tr><th scope="row">{_swatch(colour)}{html.escape(name)}</th>{cells}</tr>')
    table = f'<div class="wide"><table class="classes"><tr>{heads}</tr>\n{chr(10).join(rows)}</table></div>'
    absent = scores.absent(class_names)
    note = f"not in this set, left out of the means: {', '.join(absent)}"
    return table + (f'<p class="note">{html.escape(note)}</p>' if absent else "")


def _confusion(counts: np.ndarray, class_names: Sequence[str]) -> str:
    """Rows of the matrix as shares of the truth: numbers up to NUMBERED classes, a picture for more."""
    rest = counts[:, -1].any()
    counts, names = (counts, [*class_names, "no class"]) if rest else (counts[:, :-1], list(class_names))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    note = "A row is a class of the truth, a column what its pixels were taken for; colour grows with the share's root."
    draw = _numbers if len(class_names) <= NUMBERED else _heat_map
    return f'<p class="note">{note}</p><div class="wide">{draw(counts, shares, names)}</div>'


def _numbers(counts: np.ndarray, shares: np.ndarray, names: list[str]) -> str:
    """A table of percentages; what a cell counts is its title."""
    heads = "".join(f"<th><span>{html.escape(name)}</span></th>" for name in names)
    rows = [f"<tr><td></td>{heads}</tr>"]
    for t, row in enumerate(counts):
        cells = []
        for p, pixels in enumerate(row):
            share = shares[t, p]
            title = html.escape(f"{names[t]} → {names[p]}: {100 * share:.2f} %, {pixels} pixels")
            shade = f' style="background:rgb(var(--{"good" if t == p else "bad"}) / {0.8 * share**0.5:.3f})"'
            number = f"{100 * share:.0f}" if share >= 0.005 else ""
            cells.append(f'<td title="{title}"{shade if pixels else ""}>{number}</td>')
        rows.append(f'<tr><th scope="row">{html.escape(names[t])}</th>{"".join(cells)}</tr>')
    return f'<table class="matrix">{chr(10).join(rows)}</table><p class="note">percent of the row\'s pixels</p>'


def _heat_map(counts: np.ndarray, shares: np.ndarray, names: list[str]) -> str:
    """A picture of all cells that hold some share of their row; every tenth class has its number at the edge."""
    edge, rows, columns = 30, *shares.shape
    cells = []
    for t, p in zip(*np.nonzero(shares >= LEAST_SHARE)):
        kind, shade = "good" if t == p else "bad", shares[t, p] ** 0.5
        place = f'x="{edge + CELL * p}" y="{edge + CELL * t}" width="{CELL}" height="{CELL}"'
        cells.append(f'<rect class="{kind}" {place} fill-opacity="{shade:.2f}"/>')
    ticks = "".join(
        f'<text x="{edge - 3}" y="{edge + CELL * (n + 1)}" text-anchor="end">{n}</text>'
        f'<text x="{edge + CELL * n}" y="{edge - 4}">{n}</text>'
        for n in range(0, rows, 10)
    )
    width, height = edge + CELL * columns, edge + CELL * rows
    frame = f'<rect class="frame" x="{edge}" y="{edge}" width="{CELL * columns}" height="{CELL * rows}"/>'
    label = f"confusion matrix of {rows} classes"
    size = f'viewBox="0 0 {width + 1} {height + 1}" style="max-width:{width}px"'
    svg = f'<svg role="img" aria-label="{label}" {size}>{frame}{ticks}{chr(10).join(cells)}</svg>'
    numbered = ", ".join(f"{n} {names[n]}" for n in range(0, rows, 10))
    return f'{svg}<p class="note">{html.escape(numbered)}</p>'


def _confusion_table(counts: np.ndarray, class_names: Sequence[str]) -> str:
    names = [*class_names, "no class"]
    rows = [
        f"<tr><td>{html.escape(f'{names[t]} → {names[p]}')}</td><td>{100 * share:.2f} %</td><td>{pixels}</td></tr>"
        for t, p, share, pixels in largest_confusions(counts, CONFUSIONS)
    ]
    heads = "<tr><th>truth → predicted</th><th>share of truth</th><th>pixels</th></tr>"
    if not rows:
        return "<p>none</p>"
    return f'<div class="wide"><table class="confusions">{heads}{chr(10).join(rows)}</table></div>'


def _legend(class_names: Sequence[str]) -> str:
    colours = [*palette(len(class_names)), VOID, WRONG]
    names = [*class_names, "ignored", "truth and prediction differ"]
    chips = (f"<li>{_swatch(colour)}{html.escape(name)}</li>" for name, colour in zip(names, colours))
    return f'<ul class="legend">{"".join(chips)}</ul>'


def _examples(examples: list[Example], class_names: Sequence[str]) -> str:
    return "\n".join(_example(example, class_names) for example in examples) or "<p>none</p>"


def _example(example: Example, class_names: Sequence[str]) -> str:
    names, figures = [*class_names, "no class"], []
    for heading, file in zip(HEADINGS, example.pictures):
        kind = "png" if file.startswith(b"\x89PNG") else "jpeg"
        source = f"data:image/{kind};base64,{base64.b64encode(file).decode()}"
        figures.append(f'<figure><img src="{source}" alt="{heading}"><figcaption>{heading}</figcaption></figure>')
    said = [f"{names[t]} → {names[p]} ({100 * share:.0f} %)" for t, p, share, _ in example.confusions]
    mistaken = f"<p>most pixels mistaken: {html.escape(', '.join(said))}</p>" if said else ""
    if example.mistake is not None:
        point = f"[{example.mistake[1]},{example.mistake[0]}]"
        mistaken += f'<p>why, at its largest mistake: <code>segvit predict … --explain --point "{point}"</code></p>'
    head = f"<h3>{html.escape(example.name)} <span>mIoU {example.miou:.4f}</span></h3>"
    return f'<article>{head}{mistaken}<div class="pictures">{"".join(figures)}</div></article>'


STYLE = """
:root { --back: #fff; --card: #f4f5f7; --text: #1b1f24; --soft: #5b6470; --line: #d9dde3; --good: 37 99 235;
  --bad: 220 38 38 }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --card: #1e2329; --text: #e6e9ed; --soft: #9aa4b0;
  --line: #333a43; --good: 84 138 255; --bad: 255 90 90 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.45 system-ui, sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 20px 16px 60px }
h1 { font-size: 1.45rem; margin: 8px 0 16px; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 34px 0 10px }
h3 { font-size: .95rem; margin: 0; overflow-wrap: anywhere }
h3 span { color: var(--soft); font-weight: normal; white-space: nowrap; margin-left: 8px }
.note, article p { color: var(--soft); font-size: .87rem; margin: 4px 0 8px; overflow-wrap: anywhere }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(112px, 1fr)); gap: 10px }
.cards div { background: var(--card); border-radius: 10px; padding: 12px 14px }
.cards b { display: block; font-size: 1.4rem; font-variant-numeric: tabular-nums }
.cards span { color: var(--soft); font-size: .85rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 16px; margin: 0 }
dt { color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere; min-width: 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th { font-weight: 500; text-align: left }
.classes, .confusions { width: 100% }
.confusions { max-width: 620px }
.classes th, .classes td, .confusions th, .confusions td { padding: 4px 10px 4px 0; text-align: right;
  border-bottom: 1px solid var(--line); white-space: nowrap }
.classes th:first-child, .confusions th:first-child { text-align: left }
.confusions td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 110px }
.classes tr:first-child th, .confusions tr:first-child th { color: var(--soft); font-size: .85rem }
.bar { min-width: 76px; width: 22% }
.bar i { display: block; height: 5px; border-radius: 3px; background: var(--card); overflow: hidden }
.bar b { display: block; height: 100%; background: rgb(var(--good)) }
.swatch { display: inline-block; width: 13px; height: 13px; border-radius: 3px; margin-right: 7px; vertical-align: -1px;
  border: 1px solid var(--line) }
.matrix { font-size: 12px }
.matrix td { min-width: 28px; height: 26px; padding: 0 2px; text-align: center; border: 1px solid var(--line) }
.matrix tr:first-child td { border: 0 }
.matrix th { padding: 0 8px 0 0; text-align: right; white-space: nowrap }
.matrix tr:first-child th { padding: 4px 0; vertical-align: bottom }
.matrix tr:first-child span { writing-mode: vertical-rl; transform: rotate(180deg) }
svg { display: block; width: 100%; min-width: 480px; height: auto; font: 9px system-ui, sans-serif; fill: var(--soft) }
svg .frame { fill: none; stroke: var(--line) }
svg .good { fill: rgb(var(--good)) }
svg .bad { fill: rgb(var(--bad)) }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 0; padding: 0; list-style: none }
article { background: var(--card); border-radius: 10px; padding: 12px 14px; margin: 0 0 12px }
.pictures { display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; margin-top: 8px }
figure { margin: 0; min-width: 0 }
img { display: block; width: 100%; height: auto; border-radius: 4px }
figcaption { color: var(--soft); font-size: .8rem }
@media (max-width: 640px) { .pictures { grid-template-columns: 1fr 1fr } dl { grid-template-columns: 1fr }
  dd { margin-bottom: 6px } }
"""
