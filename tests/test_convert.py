"""Parity with the authors' implementation, on golden outputs of theirs, and on a small case of our own that ships."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import segvit
from segvit.convert import _published, convert_checkpoint, official_names, read_official
from segvit.models.backbone import resize_pos_embed
from segvit.models.registry import ModelInfo

CASES = ["A_atm_vit64", "A2_atm_vit64_cls_finalnorm", "C_shrunk128"]
SMALL = Path(__file__).parent / "data" / "small.safetensors"
SMALL_CONFIG = {
    "backbone": {
        "type": "VisionTransformer",
        "img_size": [32, 32],
        "patch_size": 8,
        "embed_dims": 16,
        "num_layers": 2,
        "num_heads": 2,
        "out_indices": [0, 1],
        "with_cls_token": False,
    },
    "decode_head": {"type": "ATMHead", "in_channels": 16, "num_classes": 3, "num_layers": 2, "num_heads": 1},
}


def official_case():
    """The small case's parameters under their official names, and the official model dict."""
    tensors = load_file(SMALL)
    state = {name.removeprefix("state/"): value for name, value in tensors.items() if name.startswith("state/")}
    return state, SMALL_CONFIG


def load(case):
    return segvit.from_official(case.state(), case.info["model_cfg"])


@pytest.mark.parametrize("name", CASES)
def test_golden_features_and_outputs(golden, name):
    case = golden(name)
    model = load(case)
    with torch.no_grad():
        features = model.features(case["input/image"])
        out = model(case["input/image"])
    for i, (tokens, grid) in enumerate(zip(features.tokens, features.grids)):
        want = f"backbone/out{i}"
        case.check(want, tokens if case[want].dim() == 3 else tokens.mT.unflatten(2, grid))
    stages = case.info["n_stages"]
    assert out.class_logits.shape[0] == stages
    for i in range(stages):
        case.check(f"head/stage{i}/class_logits", out.class_logits[i])
        if i < stages - 1:
            case.check(f"head/stage{i}/mask_lowres", out.mask_logits[i])
    size = case["input/image"].shape[2:]
    full = torch.nn.functional.interpolate(out.mask_logits[-1], size, mode="bilinear")
    case.check("head/pred_masks", full)
    case.check("head/pred", segvit.predict(model, case["input/image"], output="scores"))


@pytest.mark.parametrize("name", CASES)
def test_golden_losses_and_all_gradients(golden, name):
    case = golden(name)
    model = load(case)
    image = case["input/image"].requires_grad_()
    losses = segvit.ATMLoss(model.num_classes, ignored="negative")(model(image), case["input/label"][:, 0])
    last = len(losses.ce) - 1
    for i in range(last + 1):
        suffix = "" if i == last else f"_{i}"
        case.check(f"loss/decode.loss_ce{suffix}", losses.ce[i])
        case.check(f"loss/decode.loss_mask{suffix}", losses.focal[i])
        case.check(f"loss/decode.loss_dice{suffix}", losses.dice[i])
    case.check("loss/total", losses.total)
    losses.total.backward()
    case.check("grad/image", image.grad)
    parameters, checked = dict(model.named_parameters()), set()
    for key, want in case.tensors.items():
        if not key.startswith("grad/param/"):
            continue
        for (ours, rows), taken in official_names(
            key.removeprefix("grad/param/"), want.shape, shrunk=name.startswith("C")
        ):
            if ours not in parameters:
                assert want.abs().max() == 0  # the class token, which takes part in nothing
                continue
            grad = parameters[ours].grad
            grad = grad if rows is None else grad[rows]
            case.tensors[key] = want[taken] if want.dim() < 3 or grad.shape == want.shape else want[:, 1:]
            case.check(key, grad)
            case.tensors[key] = want
            checked.add(ours)
    assert checked == set(parameters)


@pytest.mark.parametrize("name", ["F_loss", "F3_loss_whole_batch_ignore"])
def test_golden_loss_alone(golden, name):
    case = golden(name)
    logits = [case[f"input/logits{i}"].requires_grad_() for i in range(3)]
    masks = [case[f"input/masks{i}"].requires_grad_() for i in range(3)]
    out = segvit.models.SegViTOutput(torch.stack(logits), torch.stack(masks), tuple(masks[0].shape[2:]))
    losses = segvit.ATMLoss(case.info["constructor"]["num_classes"], ignored="negative")(out, case["input/label"])
    for i, suffix in enumerate(("_0", "_1", "")):
        case.check(f"loss/loss_ce{suffix}", losses.ce[i])
        case.check(f"loss/loss_mask{suffix}", losses.focal[i])
        case.check(f"loss/loss_dice{suffix}", losses.dice[i])
    case.check("loss/total", losses.total)
    losses.total.backward()
    for i in range(3):
        case.check(f"grad/logits{i}", logits[i].grad)
        case.check(f"grad/masks{i}", masks[i].grad)


def test_golden_sliding_windows_and_flips(golden):
    model, case = load(golden("A_atm_vit64")), golden("G_slide_A")
    image = case["input/image"]
    options = {"mode": "slide", "crop_size": case.info["crop"], "stride": case.info["stride"]}
    ours = tuple(case.info["ori_shape"])
    case.check("slide/preds_imgsize", segvit.predict(model, image, output="scores", **options))
    case.check("slide/preds_orisize", segvit.predict(model, image, ours, output="scores", **options))
    single = segvit.predict(model, image, ours, output="probabilities", **options)
    both = segvit.predict(model, image, ours, output="probabilities", flip=True, **options)
    case.check("slide/softmax", single)
    case.check("aug/mean_softmax", both)
    flipped = segvit.predict(model, image.flip(-1), ours, output="probabilities", **options).flip(-1)
    case.check("slide/softmax_flip", flipped)
    for probabilities, name, extra in ((single, "slide/argmax", {}), (both, "aug/argmax", {"flip": True})):
        top = probabilities[0].topk(2, 0).values
        clear = top[0] - top[1] > 1e-4
        for protocol in ("paper", "fused"):
            labels = segvit.predict(model, image, ours, protocol=protocol, **extra, **options)[0]
            assert torch.equal(labels.long()[clear], case[name][clear])


def test_golden_backbone_alone_interpolates_positions_and_pads(golden):
    case = golden("H_backbone_pos_interp")
    backbone = segvit.from_official(case.state(), case.info["model_cfg"])
    for i in range(3):
        with torch.no_grad():
            features = backbone(case[f"input/image{i}"])
        for j, (tokens, grid) in enumerate(zip(features.tokens, features.grids)):
            case.check(f"backbone/img{i}/out{j}", tokens.mT.unflatten(2, grid))
    for side in (32, 40, 30):
        case.check(f"pos/resized_24_to_{side}", resize_pos_embed(case["pos/in"], (side, side), (24, 24), 1))


def test_the_small_case_that_ships():
    """Written by tests/make_small.py from a float64 run of this project; float32 must agree."""
    case = load_file(SMALL)
    state = {k.removeprefix("state/"): v for k, v in case.items() if k.startswith("state/")}
    model = segvit.from_official(state, SMALL_CONFIG)
    out = model(case["image"])
    losses = segvit.ATMLoss(3)(out, case["labels"])
    torch.testing.assert_close(out.class_logits, case["class_logits"].float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.mask_logits, case["mask_logits"].float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.total, case["total"].float(), rtol=1e-4, atol=1e-5)
    scores = segvit.predict(model, case["image"], (37, 41), output="scores", protocol="paper")
    torch.testing.assert_close(scores, case["scores"].float(), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_named():
    case = load_file(SMALL)
    state = {k.removeprefix("state/"): v for k, v in case.items() if k.startswith("state/")}
    load = lambda **change: segvit.from_official(state | change, SMALL_CONFIG)  # noqa: E731
    with pytest.raises(ValueError, match=r"does not have: decode_head\.gate"):
        load(**{"decode_head.gate": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'decode_head.q.weight' is \(4, 8\), the config asks for \(3, 8\)"):
        load(**{"decode_head.q.weight": torch.zeros(4, 8)})
    state.pop("decode_head.class_embed.bias")
    with pytest.raises(ValueError, match=r"does not fill: decoder\.class_embed\.bias"):
        load()
    with pytest.raises(ValueError, match=r'take state_dict\["state_dict"\]'):
        segvit.from_official({"state_dict": state, "meta": {}}, SMALL_CONFIG)
    with pytest.raises(ValueError, match="type must be VisionTransformer or vit_shrink"):
        segvit.from_official(state, {"backbone": {"type": "Swin"}, "decode_head": {}})
    with pytest.raises(ValueError, match="backbone has no 'img_size'"):
        segvit.from_official(state, {"type": "VisionTransformer"})


@pytest.mark.parametrize("kind", ["pth", "wrapped", "ddp", "safetensors"])
def test_checkpoint_files_are_read_whatever_wraps_them(kind, tmp_path):
    state, config = official_case()
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pth")
    if kind == "safetensors":
        save_file(state, path)
    else:
        stored = {f"module.{name}": value for name, value in state.items()} if kind == "ddp" else state
        torch.save({"meta": {"CLASSES": ("a", "b")}, "state_dict": stored} if kind == "wrapped" else stored, path)
    (tmp_path / "config.json").write_text(json.dumps({"model": config}))
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    convert_checkpoint(path, tmp_path / "out", config=tmp_path / "config.json", classes=tmp_path / "names.txt")
    model = segvit.SegViT.from_pretrained(tmp_path / "out").eval()
    assert model.class_names == ["a", "b", "c"]
    images = torch.randn(1, 3, 29, 35)
    with torch.no_grad():
        torch.testing.assert_close(model(images).mask_logits, segvit.from_official(state, config)(images).mask_logits)


class Harmful:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickles_that_would_run_code_are_refused_unread(tmp_path):
    harm = tmp_path / "harm"
    torch.save({"state_dict": {}, "meta": Harmful(harm)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"would run code that is stored in it, so it is refused.*safetensors"):
        read_official(tmp_path / "a.pth")
    assert not harm.exists()
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert harm.exists()  # it would have
    (tmp_path / "b.pth").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"b\.pth: not a readable checkpoint"):
        read_official(tmp_path / "b.pth")
    for other, message in (([1, 2], "no checkpoint, but a list"), ({1: 2}, "a dict without names of parameters")):
        torch.save(other, tmp_path / "c.pth")
        with pytest.raises(ValueError, match=message):
            read_official(tmp_path / "c.pth")


@pytest.mark.parametrize("info", [info for info in segvit.list_models() if info.published], ids=lambda info: info.name)
def test_published_models_are_told_by_their_shapes(info):
    shrunk = "shrink" in info.arguments
    state = {f"backbone.layers.{i}.ln1.weight": torch.ones(1) for i in range(info.arguments["out_indices"][-1] + 1)}
    state |= {"decode_head.atm.q.weight": torch.ones(1)} if shrunk else {}
    state[f"decode_head.{'atm.' if shrunk else ''}class_embed.bias"] = torch.zeros(info.num_classes + 1)
    assert _published(state, None) == info
    assert _published({}, info.name) == info
    with pytest.raises(ValueError, match=r"none of the paper's models has these parameters"):
        _published({}, None)
    with pytest.raises(ValueError, match="model must be one of the paper's"):
        _published(state, "segvit_small_dinov3_512")


def test_a_published_model_is_converted_by_its_name(tmp_path, monkeypatch):
    """Through the named model's own constructor, made small."""
    state, config = official_case()
    small = segvit.from_official(state, config)._hub_mixin_config
    info = ModelInfo("segvit_base_ade20k_512", True, small)
    monkeypatch.setattr("segvit.convert.list_models", lambda: [info])
    monkeypatch.setattr("segvit.convert.create_model", lambda name, **rest: segvit.SegViT(**(small | rest)))
    monkeypatch.setattr("segvit.convert.find_classes", lambda out, layout: [f"{layout} {i}" for i in range(3)])
    torch.save(state, tmp_path / "a.pth")
    model = convert_checkpoint(tmp_path / "a.pth", tmp_path / "out", model="segvit_base_ade20k_512")
    assert model.class_names == ["ade20k 0", "ade20k 1", "ade20k 2"]
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images).mask_logits, segvit.from_official(state, config)(images).mask_logits)
