"""The report of an evaluation: one well-formed HTML file that says what the scores say, and shows the right images."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from segvit.metrics import BoundaryIoU, ConfusionMatrix
from segvit.report import (
    HEADINGS,
    NUMBERED,
    SHOWN,
    SIDE,
    Collector,
    check_target,
    largest_confusions,
    middle,
    write_report,
)
from segvit.visualize import WRONG, palette

VOID_TAGS = ("meta", "img")
NAMES = ["sky", "<b>&", "tree", 'a "quoted" class']


class Page(HTMLParser):
    """Tags that are open, pictures, the tables' cells, and all text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.pictures, self.tables, self.text, self.titles = [], [], [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "img":
            self.pictures.append(attributes["src"])
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.titles.append(attributes.get("title"))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def scene(share, K=4, size=(20, 30)):
    """Image, labels and a prediction of which a share of the rows is wrong: class 0 is taken for class 2."""
    labels = torch.zeros(size, dtype=torch.int64)
    labels[:, 15:] = 1
    labels[:2] = 255
    predicted = labels.clone()
    wrong = torch.zeros(size, dtype=torch.bool)
    wrong[: round(share * size[0])] = True
    predicted[wrong & (labels == 0)] = 2
    predicted[labels == 255] = 3  # where there is no truth, nothing is wrong
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8), labels, predicted.to(torch.uint8)


def evaluated(shares, names=NAMES, boundary=False, **options):
    """Scores and the collector of an evaluation of scenes."""
    K = len(names)
    collector, matrix, edges = Collector(K, **options), ConfusionMatrix(K), BoundaryIoU(K)
    for i, share in enumerate(shares):
        image, labels, predicted = scene(share, K)
        collector(i, image, labels, predicted)
        matrix.update(predicted, labels)
        edges.update(predicted, labels)
    scores = matrix.compute()
    if boundary:
        per_class = edges.compute()
        scores = type(scores)(
            **vars(scores) | {"boundary_iou": per_class, "boundary_miou": float(np.nanmean(per_class))}
        )
    return scores, collector


def written(path, scores, collector, names=NAMES):
    write_report(path, scores, names, collector, "a <title>", {"checkpoint": "runs/<x>", "data": 'D"&'})
    return path.read_text(encoding="utf-8")


def decoded(uri):
    kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,([A-Za-z0-9+/=]+)", uri).groups()
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    image.load()
    assert image.format.lower() == kind
    return image


def test_the_page_is_well_formed_and_needs_nothing_else(tmp_path):
    shares = [0.2, 0.9, 0.5]
    text = written(tmp_path / "r.html", *evaluated(shares, boundary=True, name="<i>&{}.jpg".format))
    page = Page(text)
    assert not re.search("https?:", text)
    assert "url(" not in text
    assert "@import" not in text
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not {"href", "onclick", "onload"} & set(attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert tag not in ("b", "i") or set(attributes) <= {"class", "style"}
    assert len(page.pictures) == len(shares) * len(HEADINGS)
    assert all(max(decoded(uri).size) == SIDE for uri in page.pictures)
    for said in ("a <title>", "runs/<x>", 'D"&', "<i>&1.jpg", "truth and prediction differ"):
        assert said in page.text
    assert page.text.count("<b>&") >= 4  # classes, confusion (twice), colours
    assert "<b>&<" not in text
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize("boundary", [False, True])
def test_numbers_are_those_of_the_scores(tmp_path, boundary):
    scores, collector = evaluated([0.2, 0.9, 0.5], boundary=boundary)
    page = Page(written(tmp_path / "r.html", scores, collector))
    heads, *rows = page.tables[0]
    assert heads == ["class", "IoU", "accuracy", *(["boundary IoU"] if boundary else []), "share of pixels"]
    columns = [scores.iou, scores.acc, *([scores.boundary_iou] if boundary else [])]
    assert [row[0] for row in rows] == NAMES
    for row, pixels, *values in zip(rows, scores.pixels, *columns):
        assert row[1:-1] == ["–" if value != value else f"{value:.3f}" for value in values]
        assert row[-1] == f"{100 * pixels / sum(scores.pixels):.2f} %"
    for value in (scores.miou, scores.macc, scores.aacc, *([scores.boundary_miou] if boundary else [])):
        assert f"{value:.4f}" in page.text
    assert f"left out of the means: tree, {NAMES[3]}" in page.text
    assert ("boundary mIoU" in page.text) is boundary
    sizes = [float(a["style"][6:-1]) for tag, a in page.tags if tag == "b" and a.get("style", "").startswith("width:")]
    want = [100 * value for row in zip(*columns) for value in row if value == value]
    assert sizes == pytest.approx(want, abs=0.06)


def test_the_confusion_matrix_is_normalised_by_rows_and_its_largest_cells_are_listed(tmp_path):
    scores, collector = evaluated([0.5])
    page = Page(written(tmp_path / "r.html", scores, collector))
    _, matrix, listed = page.tables
    assert matrix[0][1:] == NAMES
    # 18 labelled rows of class 0, of which rows 2 to 9 were taken for class 2
    assert [row[1:] for row in matrix[1:]] == [["56", "", "44", ""], ["", "100", "", ""], [""] * 4, [""] * 4]
    assert "sky → tree: 44.44 %, 120 pixels" in page.titles
    assert listed[1:] == [["sky → tree", "44.44 %", "120"]]


def test_pixels_of_no_class_have_a_column_of_their_own(tmp_path):
    matrix, collector = ConfusionMatrix(4), Collector(4)
    matrix.counts[1, 4], matrix.counts[1, 1] = 3, 1
    page = Page(written(tmp_path / "r.html", matrix.compute(), collector))
    assert page.tables[1][0][-1] == "no class"
    assert page.tables[1][2][-1] == "75"
    assert page.tables[2][1] == ["<b>& → no class", "75.00 %", "3"]
    assert not page.pictures
    assert page.text.count("none") == 2  # neither worst nor best images


def test_many_classes_have_a_heat_map_and_twenty_confusions(tmp_path):
    K = NUMBERED + 1
    counts = np.random.default_rng(0).integers(0, 1000, (K, K + 1))
    counts[:, K] = 0
    matrix = ConfusionMatrix(K)
    matrix.counts = torch.from_numpy(counts)
    names = [f"c<{i}" for i in range(K)]
    page = Page(written(tmp_path / "r.html", matrix.compute(), Collector(K), names))
    cells = [a for tag, a in page.tags if tag == "rect" and a["class"] in ("good", "bad")]
    shares = counts[:, :K] / counts.sum(1, keepdims=True)
    assert len(cells) == (shares >= 0.005).sum()
    assert sum(a["class"] == "good" for a in cells) == (shares.diagonal() >= 0.005).sum()
    listed = page.tables[1][1:]
    assert len(listed) == 20
    off = counts[:, :K].copy()
    np.fill_diagonal(off, 0)
    assert [int(row[2]) for row in listed] == np.sort(off, axis=None)[::-1][:20].tolist()
    for cell, _, pixels in listed:
        t, p = (names.index(name) for name in cell.split(" → "))
        assert off[t, p] == int(pixels)


def test_largest_confusions_are_never_the_diagonal_nor_empty():
    counts = np.array([[9, 2, 0], [5, 8, 5]])
    assert [tuple(c) for c in largest_confusions(counts, 9)] == [
        (1, 0, 5 / 18, 5),
        (1, 2, 5 / 18, 5),
        (0, 1, 2 / 11, 2),
    ]
    assert len(largest_confusions(counts, 1)) == 1


def test_the_worst_are_the_worst_and_the_best_the_best():
    shares = torch.linspace(0.1, 1, 19)[torch.randperm(19)].tolist()
    collector = evaluated(shares)[1]
    order = sorted(range(19), key=lambda i: -shares[i])
    assert [example.name for example in collector.worst()] == [str(i) for i in order[:SHOWN]]
    assert [example.name for example in collector.best()] == [str(i) for i in order[: -SHOWN - 1 : -1]]
    for example in (*collector.worst(), *collector.best()):
        kept = 270 - 15 * max(round(20 * shares[int(example.name)]) - 2, 0)  # pixels of class 0 that are right
        assert example.miou == pytest.approx((kept / 270 + 1 + 0) / (2 if kept == 270 else 3))
        assert [(t, p, n) for t, p, _, n in example.confusions] == ([(0, 2, 270 - kept)] if kept < 270 else [])


def test_no_image_is_shown_twice_and_equals_keep_their_order():
    for count in (1, 2, 5, 2 * SHOWN, 40):
        collector = evaluated([0.0] * count)[1]
        names = [example.name for example in (*collector.worst(), *reversed(collector.best()))]
        assert len(set(names)) == len(names) == min(count, 2 * SHOWN)
        assert names == sorted(names, key=int)
        assert collector.images == count


def test_an_image_without_truth_has_no_score():
    collector = Collector(4)
    image, labels, predicted = scene(0.5)
    collector(0, image, torch.full_like(labels, 255), predicted)
    collector(1, image, labels, predicted)
    assert [example.name for example in collector.worst()] == ["1"]
    assert collector.best() == []
    assert collector.images == 2


def test_pictures_show_truth_prediction_and_errors():
    collector = Collector(4)
    collector(0, *scene(0.5))
    files = [Image.open(io.BytesIO(file)).convert("RGB") for file in collector.worst()[0].pictures]
    assert {file.size for file in files} == {(480, 320)}
    _, truth, prediction, wrong = (np.asarray(file).astype(int) for file in files)
    colours = palette(4)
    left, right, unlabelled = (200, 100), (200, 400), (8, 100)  # row and column; 16 pixels for one
    assert (truth[left] == colours[0]).all()
    assert (prediction[100, 100] == colours[2]).all()
    assert (prediction[left] == colours[0]).all()
    assert (truth[right] == colours[1]).all()
    assert (truth[unlabelled] == 0).all()
    assert (prediction[unlabelled] == colours[3]).all()
    assert abs(wrong[100, 100] - WRONG).max() < 12
    for place in (left, right, unlabelled):
        assert np.ptp(wrong[place]) < 12  # grey


@pytest.mark.parametrize(
    "image",
    [
        torch.rand(1, 20, 30),
        torch.randn(7, 20, 30).bfloat16(),
        torch.randint(0, 4000, (2, 20, 30), dtype=torch.int16),
        torch.full((3, 20, 30), float("nan")),
    ],
)
def test_images_of_any_kind_have_pictures(image):
    collector = Collector(4)
    collector(0, image, *scene(0.5)[1:])
    assert Image.open(io.BytesIO(collector.worst()[0].pictures[0])).size == (480, 320)


def test_labels_beyond_the_classes_are_drawn_as_ignored():
    collector = Collector(2, ignore_index=-100)
    image, labels, _ = scene(0)
    labels[labels == 255] = -100
    labels[5] = 700
    collector(0, image, labels, torch.ones_like(labels))
    truth = np.asarray(Image.open(io.BytesIO(collector.worst()[0].pictures[1])))
    assert (truth[:32] == 0).all()
    assert (truth[80:96] == 0).all()
    assert (truth[100:, 300] == palette(2)[1]).all()


def test_a_report_is_written_over_a_report_alone(tmp_path):
    path = tmp_path / "new" / "r.html"
    check_target(path)
    assert path.parent.is_dir()
    assert not path.exists()
    written(path, *evaluated([0.5]))
    before = path.read_bytes()
    check_target(path)
    assert path.read_bytes() == before
    path.write_text("<!doctype html><p>mine")
    with pytest.raises(ValueError, match=r"r\.html is there already, is no report, and would be overwritten"):
        check_target(path)
    with pytest.raises(ValueError, match="new is a folder; name a file for the report, such as"):
        check_target(path.parent)
    with pytest.raises(PermissionError, match=r"x\.html: cannot write there \(File exists\); choose another name"):
        check_target(path / "x.html")


def test_a_pixel_of_the_largest_mistake():
    wrong = np.zeros((100, 150), bool)
    assert middle(wrong) is None
    wrong[3, 4] = True
    assert middle(wrong) == (3, 4)
    wrong[60:90, 100:140] = True
    wrong[70:80, 115:125] = False  # its own middle is right
    y, x = middle(wrong)
    assert wrong[y, x]
    assert 60 <= y < 90
    assert 100 <= x < 140
    assert middle(np.ones((1, 1), bool)) == (0, 0)
