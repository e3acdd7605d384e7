"""bf16, fp16 and int8 beside float32: what a cast must not touch, and how far results may move."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from test_models import FAMILIES, ROTARY, tiny
from test_runs import shapes_folder  # noqa: F401  (a fixture)

import segvit
from segvit.cli import main
from segvit.inference import normalise
from segvit.models.shrunk import EdgeSelector
from segvit.ops.reference.token_resample import stride_index
from segvit.precision import in_precision

HALF = [torch.bfloat16, torch.float16]
ROUNDINGS = 6 * 8 + 9 * 12  # of what runs from an image to its logits: eight a block, twelve a layer of the decoder


def drift(dtype: torch.dtype) -> float:
    """How far, as a share of their size, logits may move: so many independent roundings add up like a random walk."""
    return ROUNDINGS**0.5 * torch.finfo(dtype).eps / 2


def score_bound(out, dtype: torch.dtype) -> torch.Tensor:  # [B, K]
    """How far a score may move when logits drift: by the slopes of sigmoid and softmax, at four standard deviations."""
    classes, masks = out.class_logits[-1], out.mask_logits[-1]
    by_class, by_mask = (drift(dtype) * logits.square().mean().sqrt() for logits in (classes, masks))
    probs = classes.softmax(-1)[..., :-1]
    return 4 * ((probs * by_mask / 4).square() + 2 * (probs * (1 - probs) * by_class).square()).sum(1).sqrt()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / a.norm()).item()


def outspoken(**kwargs) -> segvit.SegViT:
    """An untrained model that prefers some classes here and others there, as a trained one does."""
    model = tiny(**kwargs).eval()
    model.decoder.class_embed.weight.data *= 12
    for stage in model.decoder.stages:
        stage.layers[-1].q.weight.data *= 12
    return model


def family_model(family: str) -> segvit.SegViT:
    name, kwargs = FAMILIES[family]
    return outspoken(backbone=name, image_size=112 if "14" in name else 96, backbone_kwargs=kwargs)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_with_float32_as_far_as_the_dtype_can(family, dtype):
    model = family_model(family)
    half, images = copy.deepcopy(model).to(dtype), torch.rand(1, 3, *model.image_size) * 2 - 1
    with torch.no_grad():
        want, got = model(images), half(images.to(dtype))
    assert got.class_logits.dtype == got.mask_logits.dtype == torch.float32
    assert distance(want.class_logits, got.class_logits) < drift(dtype)
    assert distance(want.mask_logits, got.mask_logits) < drift(dtype)
    bound = score_bound(want, dtype)
    exact, scores = (segvit.predict(m, images, output="scores") for m in (model, half))
    assert ((exact - scores).abs() <= bound[:, :, None, None]).all()
    top = exact.topk(2, 1)
    clear = (top.values[:, 0] - top.values[:, 1])[0] > bound[0][top.indices[0]].sum(0)
    assert torch.equal(segvit.predict(half, images)[0][clear], segvit.predict(model, images)[0][clear])
    assert clear.any() or dtype == torch.bfloat16  # of two of these models no label is certain in bf16


def first_odd_cells(self, tokens, grid):
    even = stride_index(grid, 2, tokens.device)[0]
    odd = [cell for cell in range(grid[0] * grid[1]) if cell not in even]
    return torch.zeros(len(tokens), *grid), torch.tensor(odd[: self.count(grid)]).expand(len(tokens), -1)


WAYS = {
    "whole": {},
    "slide": {"mode": "slide", "crop_size": 64, "stride": 64},
    "scales and flip": {"scales": (0.5, 1.5), "flip": True},
    "short side": {"short_side": 48},
    "paper": {"protocol": "paper", "size": (61, 120)},
    "pruned": {"prune": 1e-3},
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shrink", [None, "v1", "light", "edge"])
def test_every_way_of_predicting_agrees_with_float32(shrink, dtype, monkeypatch):
    monkeypatch.setattr(EdgeSelector, "forward", first_odd_cells)  # what is nearly a tie may fall either way
    model = tiny(shrink=shrink).eval()
    half, images = copy.deepcopy(model).to(dtype), torch.rand(1, 3, 72, 90) * 2 - 1
    for way, options in WAYS.items():
        want, got = (segvit.predict(m, images, output="scores", **options) for m in (model, half))
        assert got.dtype == torch.float32, way
        limit = drift(dtype) * want.abs().max()
        assert (want - got).abs().max() < limit, way
        ranked = segvit.predict(model, images, output="probabilities", **options).topk(2, 1).values
        clear = (ranked[:, 0] - ranked[:, 1]) > limit  # the slope of a softmax is at most a half
        labels, wanted = (segvit.predict(m, images, **options) for m in (half, model))
        assert torch.equal(labels[clear], wanted[clear]), way


@pytest.mark.parametrize("dtype", HALF)
def test_images_are_normalised_in_float32(dtype):
    model = tiny(mean=[0.9, 1e5, 0.485], std=[0.004, 1e3, 0.229])
    raw = torch.rand(3, 20, 30) * model.std[:, None, None] * 4 + model.mean[:, None, None]
    want = normalise(model, raw)
    mean, std = model.mean.clone(), model.std.clone()
    model.to(dtype)
    assert next(model.parameters()).dtype == dtype
    assert torch.equal(model.mean, mean)
    assert torch.equal(model.std, std)
    assert torch.equal(normalise(model, raw), want)
    torch.nn.Sequential(model).double().half().float()  # also inside another module, and on the way back
    assert torch.equal(model.mean, mean)
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", ROTARY)
def test_rotary_positions_are_computed_from_float32_frequencies(family, dtype):
    model = family_model(family)
    want = model.backbone.model.rope.get_embed((60, 80))
    model.to(dtype)
    assert torch.equal(model.backbone.model.rope.get_embed((60, 80)).float(), want)


@pytest.mark.parametrize("dtype", HALF)
def test_images_are_rounded_once_after_they_are_resized(dtype):
    model, images = tiny().to(dtype).eval(), torch.rand(1, 3, 64, 90)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    segvit.predict(model, images, short_side=40)
    resized = F.interpolate(images, (40, 56), mode="bilinear", align_corners=False)
    assert torch.equal(seen[0], resized.to(dtype))
    assert torch.equal(
        segvit.predict(model, images, output="scores"), segvit.predict(model, images.to(dtype), output="scores")
    )


@pytest.fixture(scope="module")
def saved(shapes_folder, tmp_path_factory):  # noqa: F811
    names = (shapes_folder / "classes.txt").read_text().splitlines()
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    tiny(len(names), class_names=names).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "dtype"), [*zip(("bf16", "fp16"), HALF), *zip(("no", "int8"), [torch.float32] * 2)])
def test_commands_run_in_a_precision_and_say_so(name, dtype, saved, shapes_folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    if name == "int8":
        pytest.importorskip("torchao")
    dtypes, kinds, predict = set(), set(), segvit.predict

    def watched(model, *args, **kwargs):
        dtypes.add(next(model.parameters()).dtype)
        kinds.add(type(model.decoder.class_embed.weight.data).__module__.split(".")[0])
        return predict(model, *args, **kwargs)

    for module in ("segvit.inference", "segvit.evaluation"):
        monkeypatch.setattr(f"{module}.predict", watched)
    report = tmp_path / "report.html"
    options = ["--precision", name]
    assert main(["evaluate", str(saved), str(shapes_folder), "--json", "--report", str(report), *options]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == name
    assert f"precision {name}" in report.read_text(encoding="utf-8")
    assert main(["predict", str(saved), str(shapes_folder / "val" / "images"), "--out", str(tmp_path), *options]) == 0
    assert dtypes == {dtype}
    assert kinds == {"torchao" if name == "int8" else "torch"}


@pytest.mark.parametrize("command", ["evaluate", "predict"])
@pytest.mark.parametrize("name", ["int4", "float16", "false"])
def test_another_precision_is_refused_in_one_line(command, name, saved, shapes_folder, capsys):  # noqa: F811
    target = shapes_folder / "val" if command == "evaluate" else shapes_folder / "val" / "images"
    assert main([command, str(saved), str(target), "--precision", name]) == 1
    captured = capsys.readouterr()
    assert captured.err.strip().endswith(f"precision must be one of no, bf16, fp16, int8, got '{name}'")
    assert len(captured.err.strip().splitlines()) == 1


@pytest.mark.parametrize("family", ["AugReg", "EVA02", "BEiT v2"])
def test_torchao_makes_int8_models_that_predict(family):
    pytest.importorskip("torchao.quantization")
    model = family_model(family)
    quantised, images = copy.deepcopy(model), torch.rand(1, 3, *model.image_size) * 2 - 1
    in_precision(quantised, "int8")
    with torch.no_grad():
        want, got = model(images), quantised(images)
    step = 4 / 127 / 12**0.5  # of weights whose largest is four times their size, as a share of it
    assert 0 < distance(want.mask_logits, got.mask_logits) < step * ROUNDINGS**0.5
    assert segvit.predict(quantised, images).shape == (1, *model.image_size)
