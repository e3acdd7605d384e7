import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import segvit
from segvit.inference import _starts


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    kwargs = {"depth": 3, "embed_dim": 32, "num_heads": 2}
    model = segvit.SegViT("vit_tiny_patch16_224", 4, 64, decoder_layers=1, backbone_kwargs=kwargs).eval()
    for p in model.decoder.parameters():  # louder than an untrained decoder, so that labels differ
        p.data *= 2
    for stage in model.decoder.stages:
        stage.layers[-1].q.weight.data *= 8
    model.decoder.class_embed.weight.data *= 6
    assert len(segvit.predict(model, torch.randn(1, 3, 64, 64)).unique()) >= 3
    return model


def naive_scores(model, images):
    with torch.no_grad():
        out = model(images)
    H, W = images.shape[2:]
    padded = (-(-H // 16) * 16, -(-W // 16) * 16)
    masks = F.interpolate(out.mask_logits[-1], padded, mode="bilinear", align_corners=False).sigmoid()[..., :H, :W]
    return torch.einsum("bnk,bnhw->bkhw", out.class_logits[-1].softmax(-1)[..., :-1], masks)


@pytest.mark.parametrize("size", [(64, 64), (50, 77)])
def test_whole_image(model, size):
    images = torch.randn(2, 3, *size)
    want = naive_scores(model, images)
    torch.testing.assert_close(segvit.predict(model, images, output="scores"), want)
    resized = F.interpolate(want, (90, 30), mode="bilinear", align_corners=False)
    torch.testing.assert_close(segvit.predict(model, images, (90, 30), output="scores"), resized)
    torch.testing.assert_close(segvit.predict(model, images, (90, 30), output="probabilities"), resized.softmax(1))
    paper = segvit.predict(model, images, (90, 30), protocol="paper")
    clear = resized.topk(2, 1).values.diff(dim=1)[:, 0].abs() > 1e-6
    assert torch.equal(paper.long()[clear], resized.argmax(1)[clear])
    assert clear.float().mean() > 0.6
    assert paper.dtype == torch.uint8
    fused = segvit.predict(model, images)
    assert torch.equal(fused.long(), want.argmax(1))


def test_fused_labels_go_straight_to_the_callers_size(model):
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        out = model(images)
    probs = out.class_logits[-1].softmax(-1)[..., :-1]
    direct = torch.einsum(
        "bnk,bnhw->bkhw", probs, F.interpolate(out.mask_logits[-1], (200, 130), mode="bilinear").sigmoid()
    )
    assert torch.equal(segvit.predict(model, images, (200, 130)).long(), direct.argmax(1))
    agree = (
        segvit.predict(model, images, (200, 130)) == segvit.predict(model, images, (200, 130), protocol="paper")
    ).float()
    assert 0.9 < agree.mean() <= 1


def naive_slide(model, images, crop, stride):
    H, W = images.shape[2:]
    total, count = torch.zeros(len(images), 4, H, W), torch.zeros(H, W)
    rows = max(-(-(H - crop) // stride), 0) + 1
    columns = max(-(-(W - crop) // stride), 0) + 1
    for i in range(rows):
        for j in range(columns):
            bottom, right = min(i * stride + crop, H), min(j * stride + crop, W)
            top, left = max(bottom - crop, 0), max(right - crop, 0)
            total[:, :, top:bottom, left:right] += naive_scores(model, images[:, :, top:bottom, left:right])
            count[top:bottom, left:right] += 1
    return total / count


@pytest.mark.parametrize("size", [(100, 140), (64, 64), (40, 150), (30, 20), (65, 64)])
@pytest.mark.parametrize("window_batch", [1, 3, 100])
def test_sliding_windows(model, size, window_batch):
    images = torch.randn(2, 3, *size)
    want = naive_slide(model, images, 64, 42)
    options = {"mode": "slide", "window_batch": window_batch}  # crop and stride: the model's size, two thirds of it
    torch.testing.assert_close(segvit.predict(model, images, output="scores", **options), want)
    labels = segvit.predict(model, images, **options)
    top = want.topk(2, 1).values
    clear = top[:, 0] - top[:, 1] > 1e-5
    assert torch.equal(labels.long()[clear], want.argmax(1)[clear])


@pytest.mark.parametrize("target", [(150, 140), (50, 140), (100, 47), (33, 300), (211, 13), (1, 1)])
@pytest.mark.parametrize("strip_bytes", [1, 4 * 4 * 300 * 7, 1 << 25])
def test_labels_of_windows_are_resized_row_by_row(model, target, strip_bytes, monkeypatch):
    monkeypatch.setattr("segvit.inference.STRIP_BYTES", strip_bytes)
    images = torch.randn(2, 3, 150, 140)
    scores = F.interpolate(naive_slide(model, images, 64, 42), target, mode="bilinear", align_corners=False)
    labels = segvit.predict(model, images, target, mode="slide")
    clear = scores.topk(2, 1).values.diff(dim=1)[:, 0].abs() > 1e-5
    assert torch.equal(labels.long()[clear], scores.argmax(1)[clear])
    assert labels.shape[1:] == target


def test_labels_of_windows_keep_only_the_rows_of_open_windows(model, monkeypatch):
    sizes = []

    def watched(*args, **kwargs):
        sizes.append(kwargs["out"].shape)
        return mask_decode(*args, **kwargs)

    mask_decode = segvit.ops.mask_decode
    monkeypatch.setattr("segvit.inference.mask_decode", watched)
    labels = segvit.predict(model, torch.zeros(3, 1000, 80, dtype=torch.uint8), mode="slide")
    assert labels.shape == (1, 1000, 80)
    assert set(sizes) == {(1, 4, 64, 80)}


def test_auto_slides_where_an_image_has_more_than_four_times_the_pixels(model):
    for size, mode in (((128, 128), "whole"), ((129, 128), "slide")):
        images = torch.randn(1, 3, *size)
        want = segvit.predict(model, images, output="scores", mode=mode)
        assert torch.equal(segvit.predict(model, images, output="scores", mode="auto"), want)


def test_short_side_is_a_scale_of_each_image(model):
    images = torch.randn(1, 3, 120, 160)
    for options in ({"output": "scores"}, {"protocol": "paper"}, {}):
        want = segvit.predict(model, images, scales=(0.5,), **options)
        got = segvit.predict(model, images, short_side=60, **options)
        assert got.shape[-2:] == (120, 160)
        assert torch.equal(got, want)


def test_where_windows_begin():
    assert _starts(100, 64, 43) == [0, 36]
    assert _starts(140, 64, 43) == [0, 43, 76]
    assert _starts(64, 64, 43) == [0]
    assert _starts(150, 64, 43) == [0, 43, 86]


def test_several_scales_and_flips_average_probabilities(model):
    images = torch.randn(1, 3, 64, 80)
    variants = []
    for scale in (0.5, 1.0, 1.25):
        size = (round(64 * scale), round(80 * scale))
        x = F.interpolate(images, size, mode="bilinear", align_corners=False)
        for flip in (False, True):
            scores = naive_scores(model, x.flip(-1) if flip else x)
            scores = scores.flip(-1) if flip else scores
            variants.append(F.interpolate(scores, (64, 80), mode="bilinear", align_corners=False).softmax(1))
    want = sum(variants) / 6
    options = {"scales": (0.5, 1.0, 1.25), "flip": True}
    torch.testing.assert_close(segvit.predict(model, images, output="probabilities", **options), want)
    assert torch.equal(segvit.predict(model, images, **options).long(), want.argmax(1))


def test_every_kind_of_picture_gives_the_same(model, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    raw = torch.from_numpy(array).permute(2, 0, 1)
    normalised = (raw.float() / 255 - 0.5) / 0.5
    want = segvit.predict(model, normalised[None])
    for images in (raw, raw[None], array, Image.fromarray(array), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert torch.equal(segvit.predict(model, images), want)
    assert not torch.equal(segvit.predict(model, (normalised[None] + 1) / 2), want)  # normalisation matters
    both = segvit.predict(model, [array, tmp_path / "a.png"])
    assert torch.equal(both, want.expand(2, -1, -1))


def test_images_of_several_sizes_give_a_list_unless_size_is_given(model):
    images = [np.zeros((40, 50, 3), np.uint8), np.zeros((60, 30), np.uint8)]
    results = segvit.predict(model, images)
    assert [tuple(r.shape) for r in results] == [(40, 50), (60, 30)]
    assert segvit.predict(model, images, 32).shape == (2, 32, 32)


def test_a_photo_is_turned_as_its_exif_says(model, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
    assert segvit.predict(model, tmp_path / "turned.png").shape == (1, 64, 48)


@pytest.mark.parametrize("training", [True, False])
def test_modes_of_all_modules_are_left_as_found(model, training):
    model.train(training)
    model.decoder.stages[0].eval()
    before = [m.training for m in model.modules()]
    first, second = (segvit.predict(model, torch.ones(1, 3, 64, 64), output="scores") for _ in range(2))
    assert torch.equal(first, second)  # no dropout
    assert [m.training for m in model.modules()] == before
    model.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_precision_takes_raw_images(dtype):
    calm = segvit.SegViT("vit_tiny_patch16_224", 4, 64, backbone_kwargs={"depth": 3, "embed_dim": 32, "num_heads": 2})
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    want = segvit.predict(calm, image, output="scores")
    got = segvit.predict(calm.to(dtype), image, output="scores")
    assert (got - want).norm() < 0.02 * want.norm()


def test_no_gradient_is_kept(model):
    assert not segvit.predict(model, torch.randn(1, 3, 64, 64, requires_grad=True), output="scores").requires_grad


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (None, {"mode": "windows"}, ValueError, "mode must be one of whole, slide"),
        (None, {"output": "logits"}, ValueError, "output must be one of labels, scores, probabilities"),
        (None, {"protocol": "fast"}, ValueError, "protocol must be one of fused, paper"),
        (None, {"size": (0, 4)}, ValueError, r"size must be an int or \(height, width\)"),
        (None, {"mode": "slide", "crop_size": 32, "stride": 40}, ValueError, "stride must not exceed crop_size"),
        (None, {"scales": ()}, ValueError, "scales must be factors above 0"),
        (None, {"window_batch": 0}, ValueError, "window_batch must be"),
        (None, {"short_side": 0}, ValueError, "short_side must be"),
        (None, {"stride": 8}, ValueError, 'crop_size and stride go with mode "slide" or "auto"'),
        (torch.zeros(3, 64, 64), {}, ValueError, r"a float tensor must be \[B, C, H, W\]"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int32), {}, ValueError, "an integer tensor must be uint8"),
        (torch.zeros(1, 4, 64, 64), {}, ValueError, r"images must be a tensor \[B, 3, H, W\]"),
        (torch.zeros(1, 4, 64, 64, dtype=torch.uint8), {}, ValueError, "the model takes 3 channels, got 4"),
        (torch.zeros(1, 3, 64, 64, device="meta"), {}, ValueError, "images are on meta, but the model is on cpu"),
        ([torch.zeros(3, 64, 64)], {}, ValueError, r"tensors in a sequence must be uint8 \[C, H, W\]"),
        (None, {"scales": 1.5}, ValueError, "scales must be factors above 0"),
        (None, {"size": 5.5}, ValueError, "size must be an int"),
        (np.zeros((4, 4, 3), np.int32), {}, ValueError, "images: values are int32; save them as uint8, uint16 or"),
        (np.full((4, 4, 3), -1, np.int16), {}, ValueError, "images: int16 with values down to -1"),
        (np.full((4, 4, 3), np.nan), {}, ValueError, "images: NaN or infinity among its values"),
        (np.zeros((2, 4, 4, 3)), {}, ValueError, r"images: an array must be \[H, W, C\] or \[H, W\]"),
        (np.zeros((4, 4, 4)), {}, ValueError, "the model takes 3 channels, got 4"),
        (Image.new("F", (4, 4)), {}, ValueError, "images: the image has mode F, 32 bits a pixel"),
        ([], {}, ValueError, "images must be a tensor, an array, a picture"),
        ("nowhere.jpg", {}, FileNotFoundError, "nowhere.jpg: no such file"),
        (__file__, {}, ValueError, "not a readable image"),
    ],
)
def test_bad_input_gets_one_clear_error(model, images, options, error, message):
    with pytest.raises(error, match=message):
        segvit.predict(model, torch.zeros(1, 3, 64, 64) if images is None else images, **options)


def test_pruning_reaches_every_way_of_decoding(model):
    model = copy.deepcopy(model)
    model.decoder.class_embed.weight.data /= 20  # less sure of its classes
    images = torch.randn(1, 3, 100, 90)
    with torch.no_grad():
        likeliest = model(images).class_logits[-1].softmax(-1)[..., :-1].amax(-1)
    epsilon = likeliest.sort().values[0, :2].mean().item()  # drops one class token of four
    for options in ({}, {"mode": "slide"}, {"flip": True}):
        exact = segvit.predict(model, images, output="scores", **options)
        pruned = segvit.predict(model, images, output="scores", prune=epsilon, **options)
        assert 0 < (exact - pruned).abs().max() < 4 * epsilon
        assert torch.equal(segvit.predict(model, images, output="scores", prune=1e-12, **options), exact)
    pruned = segvit.predict(model, images, output="scores", prune=epsilon)
    for protocol in ("fused", "paper"):
        labels = segvit.predict(model, images, prune=epsilon, protocol=protocol)
        clear = pruned.topk(2, 1).values.diff(dim=1)[:, 0].abs() > 1e-5
        assert torch.equal(labels.long()[clear], pruned.argmax(1)[clear])
    for value in (-0.1, 1, True, "0.1"):
        with pytest.raises(ValueError, match=r"prune must be a probability in \[0, 1\)"):
            segvit.predict(model, images, prune=value)


def test_a_compiled_model_predicts_the_same(model):
    torch._dynamo.reset()
    images = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(segvit.predict(compiled, images), segvit.predict(model, images))
