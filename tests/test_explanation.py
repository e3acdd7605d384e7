import numpy as np
import pytest
import torch
from PIL import Image
from test_models import SMALL, tiny

import segvit
from segvit.explanation import EDGE, EVEN, Explanation
from segvit.models.shrunk import EdgeSelector
from segvit.panels import Style
from segvit.visualize import palette


def loud(model):
    """Labels of an untrained decoder differ when it is louder."""
    for p in model.decoder.parameters():
        p.data *= 2
    for stage in model.decoder.stages:
        stage.layers[-1].q.weight.data *= 2
    model.decoder.class_embed.weight.data *= 3
    return model.eval()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return loud(tiny(class_names=["sky", "road", "tree", "car", "a name of many words"], decoder_layers=1))


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (50, 77, 3), np.uint8)


def test_labels_are_those_of_predict(model, image, tmp_path):
    Image.fromarray(image).save(tmp_path / "a.png")
    raw = torch.from_numpy(image).permute(2, 0, 1)
    want = segvit.predict(model, image)[0]
    assert len(want.unique()) >= 3
    for given in (image, Image.fromarray(image), raw, tmp_path / "a.png", str(tmp_path / "a.png")):
        explanation = segvit.explain(model, given)
        assert torch.equal(explanation.labels, want)
        assert explanation.labels.dtype == want.dtype
        assert (np.asarray(explanation.image) == image).all()
    assert explanation.seen == (50, 77)
    for side in (32, 90):
        explanation = segvit.explain(model, image, short_side=side)
        assert torch.equal(explanation.labels, segvit.predict(model, image, short_side=side)[0])
        assert explanation.seen == (side, round(77 * side / 50))
    assert torch.equal(segvit.explain(model, image[:, :, 0]).labels, segvit.predict(model, image[:, :, 0])[0])


def test_one_pass_gives_the_stages_of_the_model(model, image, monkeypatch):
    passes = []
    forward = model.backbone.forward
    monkeypatch.setattr(model.backbone, "forward", lambda *args: passes.append(1) or forward(*args))
    explanation = segvit.explain(model, image)
    assert len(passes) == 1
    with torch.no_grad():
        out = model((torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5)
    probs = out.class_logits[:, 0].softmax(-1)
    own = torch.stack([probs[:, n, n] for n in range(5)], 1)
    torch.testing.assert_close(explanation.confidence, own)
    torch.testing.assert_close(explanation.no_object, probs[..., 5])
    torch.testing.assert_close(explanation.masks, out.mask_logits[:, 0].sigmoid())
    assert explanation.extent == out.extent
    assert explanation.kept is None
    assert explanation.edges is None


def test_the_ranking_of_a_pixel_is_what_predict_compares(model, image):
    explanation = segvit.explain(model, image)
    scores = segvit.predict(model, image, output="scores")[0]
    masks = torch.stack([explanation.mask(-1, k, (50, 77)) for k in range(5)])
    best = scores.topk(2, 0).values
    for y, x in ((0, 0), (49, 76), (0, 76), (20, 30), (33, 8), (7, 60)):
        ranking = explanation.ranking(y, x)
        assert sorted(r.number for r in ranking) == list(range(5))
        assert [r.score for r in ranking] == sorted((r.score for r in ranking), reverse=True)
        for r in ranking:
            assert r.name == model.class_names[r.number]
            assert r.score == pytest.approx(scores[r.number, y, x].item(), abs=1e-6)
            assert r.confidence == explanation.confidence[-1, r.number].item()
            assert r.mask == pytest.approx(masks[r.number, y, x].item(), abs=1e-6)
        assert best[0, y, x] - best[1, y, x] > 1e-5
        assert ranking[0].number == explanation.labels[y, x]
    torch.testing.assert_close(explanation.scores((50, 77)), scores)


@pytest.mark.parametrize("shrink", ["edge", "light", "v1"])
def test_kept_cells_are_those_of_the_backbone(shrink):
    model = loud(tiny(shrink=shrink, decoder_layers=1, image_size=(80, 112)))
    if shrink == "edge":
        torch.nn.init.normal_(model.select.head[-1].weight)
    image = torch.randint(0, 256, (3, 77, 100), dtype=torch.uint8)
    explanation = segvit.explain(model, image)
    even = torch.zeros(5, 7, dtype=torch.bool)
    even[::2, ::2] = True
    assert torch.equal(explanation.kept == EVEN, even)
    with torch.no_grad():
        features = model.features((image[None].float() / 255 - 0.5) / 0.5)
    if shrink == "edge":
        cells = (explanation.kept == EDGE).flatten().nonzero()[:, 0]
        assert len(cells) == 4
        assert torch.equal(cells, features.extra[0].sort().values)
        torch.testing.assert_close(explanation.edges, features.edge_logits[0].sigmoid())
    else:
        assert explanation.edges is None
        assert features.extra is None
        assert not (explanation.kept == EDGE).any()
    explanation.picture(side=64, point=(76, 99))


def test_edge_cells_are_chosen_by_one_rule():
    select = EdgeSelector(8, 0.3)
    logits, chosen = select(torch.randn(2, 35, 8), (5, 7))
    assert torch.equal(select.choose(logits.flatten(1), (5, 7)), chosen)


def test_large_images_are_shrunk_where_asked(model, image):
    assert segvit.explain(model, image, max_pixels=50 * 77).seen == (50, 77)
    explanation = segvit.explain(model, image, max_pixels=1000)
    assert explanation.seen == (25, 39)
    assert explanation.labels.shape == (50, 77)
    assert segvit.explain(model, image, max_pixels=1000, short_side=10).seen == (10, 15)
    beit = tiny(backbone="beitv2_base_patch16_224.in1k_ft_in22k_in1k", image_size=64, decoder_layers=1)
    assert segvit.explain(beit, image, max_pixels=10**6).seen == (41, 64)


def test_which_classes_are_shown(model, image):
    explanation = segvit.explain(model, image)
    area = torch.bincount(explanation.labels.flatten().long(), minlength=5)
    confidence = explanation.confidence[-1]
    assert explanation.shown == sorted(range(5), key=lambda k: (-area[k].item(), -confidence[k].item()))
    assert (area == 0).sum() >= 1
    assert segvit.explain(model, image, top=2).shown == explanation.shown[:2]
    assert segvit.explain(model, image, ["car", 0, "car", "sky"]).shown == [3, 0]
    assert segvit.explain(model, image, "tree").shown == [2]


def shows(page, number):
    """The colour of a class out of five."""
    return bool((np.asarray(page) == palette(5)[number]).all(-1).any())


def test_the_page(model, image):
    explanation = segvit.explain(model, image, classes=["car"])
    page = explanation.picture()
    assert shows(page, 3)
    for k in explanation.labels.unique().tolist():
        assert shows(page, k)
    two = segvit.explain(model, image, classes=["car", "sky"]).picture()
    assert two.height > page.height + 156  # a panel of 240 by 156
    assert explanation.picture(side=400).height > page.height
    pointed = explanation.picture(point=(10, 20))
    assert pointed.height > page.height + 100


def test_the_masks_of_a_pixels_best_classes_are_shown_though_nobody_asked(model, image):
    explanation = segvit.explain(model, image)
    y, x = 20, 30
    best, second, *_, last = (r.number for r in explanation.ranking(y, x))
    heights = [
        segvit.explain(model, image, classes).picture(point=(y, x)).height for classes in ([last], [best, second])
    ]
    assert heights[0] > heights[1] + 100


@pytest.mark.parametrize("size", [(40, 400), (400, 40), (1, 1), (33, 33)])
def test_pages_of_any_shape_and_of_long_names(size):
    names = ["x" * 300, "a name of many words " * 20, *(f"class {i}" for i in range(148))]
    model = tiny(num_classes=150, class_names=names, shrink="edge", decoder_layers=1)
    explanation = segvit.explain(model, torch.zeros(3, *size, dtype=torch.uint8), classes=[0, 1])
    page = explanation.picture(side=100, point=(size[0] - 1, size[1] - 1))
    assert page.width < 8000
    rows = (np.asarray(page) < 128).any((1, 2)).nonzero()[0]
    shorter = explanation.picture(side=100)
    assert rows[-1] > shorter.height + 60  # the ranking's lines lie below all that there is without them
    assert rows[-1] < page.height - 1


@pytest.mark.parametrize("width", [20, 90, 300])
def test_no_line_is_wider_than_its_place_and_no_letter_is_lost(width):
    style, text = Style(1.0), "a fewwords Donaudampfschifffahrtsgesellschaft and iiii " + "W" * 40
    lines = style.wrapped(text, width)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert max(style.font.getlength(line) for line in lines) <= width
    assert style.text(text, width).width == width


def test_one_class_and_seven_channels():
    model = tiny(num_classes=1, in_chans=7, decoder_layers=1)
    image = np.random.default_rng(0).random((40, 50, 7), np.float32)
    explanation = segvit.explain(model, image)
    assert torch.equal(explanation.labels, segvit.predict(model, image)[0])
    assert explanation.image.size == (50, 40)
    explanation.picture(side=64)


def test_a_model_of_float64(image):
    model = tiny(decoder_layers=1).double()
    explanation = segvit.explain(model, image)
    scores = segvit.predict(model, image, output="scores")[0]
    assert explanation.ranking(5, 6)[0].score == pytest.approx(scores[:, 5, 6].max().item(), abs=1e-12)
    explanation.picture(side=64)


@pytest.mark.parametrize("training", [True, False])
def test_modes_of_all_modules_are_left_as_found(image, training):
    model = segvit.SegViT("vit_tiny_patch16_224", 3, 64, decoder_layers=1, backbone_kwargs=SMALL)
    model.train(training)
    model.decoder.stages[0].eval()
    before = [m.training for m in model.modules()]
    first, second = segvit.explain(model, image), segvit.explain(model, image)
    assert torch.equal(first.class_probs, second.class_probs)  # no dropout
    assert [m.training for m in model.modules()] == before
    assert not first.mask_logits.requires_grad


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"image": torch.zeros(1, 3, 8, 8)}, ValueError, r"image must be one path, .* got a tensor \(1, 3, 8, 8\)"),
        ({"image": torch.zeros(3, 8, 8)}, ValueError, r"must be uint8 \[C, H, W\]"),
        ({"image": ["a.jpg"]}, ValueError, "image must be one path, PIL image, array or uint8 tensor .* got list"),
        ({"image": "nowhere.jpg"}, FileNotFoundError, "nowhere.jpg: no such file"),
        ({"image": np.zeros((4, 4, 4), np.uint8)}, ValueError, "the model takes 3 channels, got 4"),
        ({"classes": ["rood"]}, ValueError, "classes: 'rood' is neither a class of the model .* 0 to 4; near: road"),
        ({"classes": [5]}, ValueError, "classes: 5 is neither"),
        ({"classes": [-1]}, ValueError, "classes: -1 is neither"),
        ({"classes": []}, ValueError, "classes must name at least one class"),
        ({"top": 0}, ValueError, "top must be an integer of at least 1, got 0"),
        ({"top": None}, ValueError, "top must be"),
        ({"short_side": 0.5}, ValueError, "short_side must be"),
        ({"max_pixels": 0}, ValueError, "max_pixels must be"),
    ],
)
def test_bad_input_gets_one_clear_error(model, image, options, error, message):
    with pytest.raises(error, match=message):
        segvit.explain(model, **({"image": image} | options))


@pytest.mark.parametrize("point", [(50, 0), (0, 77), (-1, 0), (0, -1)])
def test_a_point_outside_is_refused(model, image, point):
    explanation = segvit.explain(model, image)
    assert isinstance(explanation, Explanation)
    for call in (lambda: explanation.ranking(*point), lambda: explanation.picture(point=point)):
        with pytest.raises(ValueError, match="is outside the image, which is 77 wide and 50 high"):
            call()
    for no_point in (3, (1.5, 2), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"point must be \(row, column\)"):
            explanation.picture(point=no_point)
    with pytest.raises(ValueError, match="side must be"):
        explanation.picture(side=8)


@pytest.mark.parametrize("window", [(0, 0, 41, 10), (-1, 0, 5, 5), (0, 0, 0, 5), (1, 2), 3])
def test_a_window_outside_the_image_is_refused(window):
    with pytest.raises(ValueError, match=r"window must be \(top, left, height, width\) inside the image, which is 40"):
        segvit.explain(tiny(decoder_layers=1), torch.zeros(3, 40, 50, dtype=torch.uint8), window=window)
