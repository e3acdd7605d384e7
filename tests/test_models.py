"""Backbones of every family, SegViT at any size, Shrunk, checkpointing, freezing, saving; models by name."""

import json
from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import segvit
from segvit.models.backbone import Backbone

SMALL = {"embed_dim": 64, "depth": 6, "num_heads": 2}
FAMILIES = {  # made small, with random weights
    "AugReg": ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", SMALL),
    "DeiT III": ("deit3_small_patch16_224.fb_in22k_ft_in1k", SMALL),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2.lvd142m", SMALL),
    "DINOv3": ("vit_small_patch16_dinov3.lvd1689m", SMALL),
    "EVA02": ("eva02_tiny_patch14_224.mim_in22k", SMALL),
    "EVA02, separate projections": ("eva02_base_patch14_224.mim_in22k", SMALL),
    "mixed RoPE": ("vit_small_patch16_rope_mixed_224.naver_in1k", SMALL),
    "SigLIP": ("vit_base_patch16_siglip_224.webli", SMALL),
    "CLIP": ("vit_base_patch16_clip_224.openai", SMALL),
    "BEiT v2": ("beitv2_base_patch16_224.in1k_ft_in22k_in1k", SMALL),
}
ROTARY = ("DINOv3", "EVA02", "EVA02, separate projections", "mixed RoPE")


def tiny(num_classes=5, backbone="vit_tiny_patch16_224", image_size=64, dropout=0.0, drop_path=0.0, **kwargs):
    kwargs = {"backbone_kwargs": SMALL} | kwargs
    return segvit.SegViT(backbone, num_classes, image_size, dropout=dropout, drop_path=drop_path, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_every_parameter(family):
    name, kwargs = FAMILIES[family]
    size = 112 if "14" in name else 96
    model = tiny(backbone=name, image_size=size, backbone_kwargs=kwargs)
    images = torch.randn(2, 3, size, size)
    out = model(images)
    side = size // model.backbone.patch_size[0]
    assert out.class_logits.shape == (3, 2, 5, 6)
    assert out.mask_logits.shape == (3, 2, 5, side, side)
    segvit.ATMLoss(5)(out, torch.randint(0, 5, (2, size, size))).total.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without, f"no gradient, so distributed training would wait: {without}"
    labels = segvit.predict(model, torch.randn(1, 3, size - 13, size - 29))
    assert labels.shape == (1, size - 13, size - 29)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_loop_over_the_blocks_is_timms_own(family):
    """Tokens after each block equal timm's forward_intermediates at the stored size."""
    name, kwargs = FAMILIES[family]
    backbone = Backbone(name, (1, 3, 5), **kwargs).eval()
    images = torch.randn(1, 3, *backbone.image_size)
    with torch.no_grad():
        ours = backbone(images)
        theirs = backbone.model.forward_intermediates(
            images, indices=[1, 3, 5], norm=False, output_fmt="NLC", intermediates_only=True
        )
    for a, b in zip(ours.tokens, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (65, 64), (33, 100), (16, 16), (1, 1), (150, 47)])
def test_any_size_and_aspect(size):
    model = tiny().eval()
    image = torch.randn(1, 3, *size)
    padded = F.pad(image, (0, -size[1] % 16, 0, -size[0] % 16))
    with torch.no_grad():
        out, whole = model(image), model(padded)
    assert out.extent == (size[0] / 16, size[1] / 16)
    torch.testing.assert_close(out.mask_logits, whole.mask_logits)
    labels = segvit.predict(model, image)
    assert labels.shape == (1, *size)
    scores = segvit.predict(model, padded, output="scores")[:, :, : size[0], : size[1]]
    torch.testing.assert_close(segvit.predict(model, image, output="scores"), scores)


@pytest.mark.parametrize("channels", [1, 4, 7])
def test_any_number_of_channels(channels):
    model = tiny(in_chans=channels)
    assert model(torch.randn(1, channels, 64, 64)).mask_logits.shape == (3, 1, 5, 4, 4)
    assert len(model.mean) == channels


def test_out_indices_are_derived_as_the_paper_has_them():
    assert Backbone("vit_tiny_patch16_224").out_indices == (5, 7, 11)
    assert Backbone("vit_tiny_patch16_224", depth=24, embed_dim=24, num_heads=2).out_indices == (7, 15, 23)
    shrunk = Backbone("vit_tiny_patch16_224", depth=24, embed_dim=24, num_heads=2, shrink=True)
    assert (shrunk.out_indices, shrunk.shrink_at) == ((7, 23), 8)


def test_stage_masks_are_cumulative_and_shrunk_ones_are_not():
    model = tiny().eval()
    with torch.no_grad():
        features = model.features(torch.randn(1, 3, 64, 64)).tokens
        stages = model.decoder.stages
        masks = model.decoder(features)[1]
        x = model.decoder.queries[None]
        for i, (project, stage, tokens) in enumerate(zip(model.decoder.projections, stages, reversed(features))):
            x, own = stage(x, project(tokens), with_mask=True)
            torch.testing.assert_close(masks[i] - (masks[i - 1] if i else 0), own)


def test_the_stored_size_is_rounded_up_to_the_patches():
    for backbone in ("vit_tiny_patch16_224", "beitv2_base_patch16_224"):
        model = tiny(backbone=backbone, image_size=(100, 8))
        assert model.image_size == (112, 16)
        assert model(torch.randn(1, 3, 100, 8)).extent == (6.25, 0.5)
        assert segvit.predict(model, torch.randn(1, 3, 100, 8)).shape == (1, 100, 8)


def test_activation_checkpointing_gives_the_same_gradients():
    plain, saving = tiny(), tiny(activation_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64))
    for model in (plain, saving):
        segvit.ATMLoss(5)(model(images), labels).total.backward()
    for a, b in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_frozen_backbone_keeps_still():
    model = tiny(freeze_backbone=True, drop_path=0.5)
    model.train()
    assert not any(module.training for module in model.backbone.modules())
    images = torch.randn(1, 3, 64, 64)
    assert not model.features(images).tokens[0].requires_grad
    assert torch.equal(model.features(images).tokens[-1], model.features(images).tokens[-1])
    segvit.ATMLoss(5)(model(images), torch.zeros(1, 64, 64, dtype=torch.long)).total.backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.decoder.parameters())
    grouped = [p for group in model.parameter_groups() for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.decoder.parameters()}


@pytest.mark.parametrize("shrink", ["v1", "light", "edge"])
def test_parameter_groups_hold_every_parameter_once(shrink):
    model = tiny(shrink=shrink)
    groups = model.parameter_groups(lr=1.0, weight_decay=0.5, decoder_lr=7.0)
    everything = [p for group in groups for p in group["params"]]
    assert len(everything) == len({id(p) for p in everything}) == len(list(model.parameters()))
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1.0, 0.5), (1.0, 0.0), (7.0, 0.5)]
    norms = {id(p) for p in groups[1]["params"]}
    assert id(model.backbone.model.blocks[0].norm1.weight) in norms
    assert id(model.upsample.projections[0][1].weight) not in norms


def test_layer_decay_slows_down_what_is_far_from_the_features():
    model = tiny(final_norm=True)
    depth = len(model.backbone.model.blocks)
    groups = model.parameter_groups(lr=1.0, weight_decay=0.5, decoder_lr=7.0, layer_decay=0.5)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(rates) == len(list(model.parameters()))
    vit = model.backbone.model
    assert rates[id(vit.norm.weight)] == (1.0, 0.0)
    for i, block in enumerate(vit.blocks):
        assert rates[id(block.mlp.fc1.weight)] == (0.5 ** (depth - 1 - i), 0.5)
        assert rates[id(block.norm1.weight)] == (0.5 ** (depth - 1 - i), 0.0)
    assert rates[id(vit.patch_embed.proj.weight)] == rates[id(vit.pos_embed)] == (0.5**depth, 0.5)
    assert rates[id(model.decoder.queries)] == (7.0, 0.5)


@pytest.mark.parametrize("shrink", [None, "v1", "light", "edge"])
def test_saving_and_loading_gives_the_same_model(tmp_path, shrink):
    model = tiny(3, class_names=["sky", "road", "tree"], shrink=shrink, decoder_layers=2).eval()
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["backbone"] == "vit_tiny_patch16_224"
    again = segvit.SegViT.from_pretrained(tmp_path / "model").eval()
    assert again.class_names == ["sky", "road", "tree"]
    images = torch.randn(1, 3, 64, 64)
    for a, b in zip(model(images)[:2], again(images)[:2]):
        assert torch.equal(a, b)


def test_a_saved_model_does_not_look_for_the_weights_it_was_trained_from(tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", img_size=64, **SMALL)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = tiny(pretrained=str(tmp_path / "weights.pth"))
    assert torch.equal(model.backbone.model.pos_embed, source.pos_embed)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "weights.pth").unlink()
    segvit.SegViT.from_pretrained(tmp_path / "model")


def test_real_weights_load_from_a_file_at_any_stored_size():
    from conftest import shared

    path = shared("weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors")
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    backbone = Backbone(name, pretrained=str(path), image_size=(224, 224)).eval()
    from safetensors.torch import load_file

    stored = load_file(path)
    for key in ("pos_embed", "cls_token", "blocks.3.attn.qkv.weight", "blocks.11.mlp.fc2.bias"):
        own = backbone.model.get_parameter(key)
        assert own.dtype == torch.float32
        assert torch.equal(own, stored[key].float())
    wide = segvit.SegViT(name, 11, (192, 256), pretrained=str(path))
    assert wide.backbone.model.pos_embed.shape == (1, 1 + 12 * 16, 192)
    official = Backbone(name, pretrained=str(path), class_token=False, global_pool="")
    assert torch.equal(official.model.pos_embed, stored["pos_embed"][:, 1:].float())
    assert torch.equal(official.model.blocks[0].norm1.weight, stored["blocks.0.norm1.weight"].float())
    assert wide.mean.tolist() == [0.5] * 3


def test_normalisation_comes_with_the_backbone():
    assert tiny(backbone="vit_small_patch16_dinov3.lvd1689m").mean[0] == pytest.approx(0.485)
    assert tiny(backbone="eva02_tiny_patch14_224.mim_in22k").std[2] == pytest.approx(0.27577711)
    assert tiny(mean=[0.1, 0.2, 0.3]).mean.tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_the_whole_model_compiles_in_one_graph():
    torch._dynamo.reset()
    few = {"backbone_kwargs": SMALL | {"depth": 3}, "decoder_layers": 1}
    models = (tiny(**few), tiny(backbone="vit_small_patch16_dinov3", **few), tiny(shrink="v1", **few))
    for model in (*models, tiny(shrink="edge", **few)):
        images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64))
        loss = segvit.ATMLoss(5)
        step = torch.compile(
            lambda x, y, model=model, loss=loss: loss(model(x), y).total, fullgraph=True, backend="aot_eager"
        )
        total = step(images, labels)
        torch.testing.assert_close(total, loss(model(images), labels).total)
        total.backward()


@pytest.mark.parametrize("shrink", [None, "v1", "light", "edge"])
def test_autocast_trains_and_gives_float32_outputs(shrink):
    """Backward inside the autocast region too: some loops have it there."""
    model = tiny(shrink=shrink)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.randn(1, 3, 64, 64))
        segvit.ATMLoss(5)(out, torch.randint(0, 5, (1, 64, 64))).total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert out.class_logits.dtype == out.mask_logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "vit_tiny_patch16_225"}, "timm has no model 'vit_tiny_patch16_225'; near: vit_tiny_patch16_224"),
        ({"backbone": "resnet50"}, "'resnet50' is no plain ViT"),
        ({"num_classes": 0}, "num_classes must be an integer of at least 1"),
        ({"image_size": (64, 64, 3)}, r"image_size must be an int or \(height, width\)"),
        ({"out_indices": (1, 9)}, "out_indices must be ascending block numbers from 0 to 5"),
        ({"out_indices": (3, 1)}, "out_indices must be ascending"),
        ({"shrink": "v3"}, 'shrink must be None, "v1", "light" or "edge"'),
        ({"shrink": "edge", "edge_budget": 0}, r"edge_budget must be in \(0, 1\], got 0"),
        ({"shrink": "v1", "shrink_at": 6}, "shrink_at must be a block number from 1 to 5"),
        ({"shrink": "v1", "out_indices": (1, 3, 5)}, "out_indices must be one block before shrink_at"),
        ({"decoder_heads": 3}, "decoder_heads must divide decoder_dim, got 3 and 32"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"class_names": ["a"]}, "class_names must have num_classes = 5 names"),
        ({"mean": [0.5]}, r"mean must have one value per channel \(3\)"),
        ({"pretrained": "nowhere.safetensors"}, "there is no file 'nowhere.safetensors'"),
        ({"backbone_kwargs": {"wings": 2}}, "cannot be built with"),
        ({"backbone": "deit3_small_patch16_224", "pos_antialias": False}, "has positions of another kind"),
    ],
)
def test_bad_arguments_get_one_clear_error(change, message):
    with pytest.raises(ValueError, match=message):
        tiny(**change)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 64, 64), r"images must be a tensor \[B, 3, H, W\], got \(3, 64, 64\)"),
        (torch.zeros(1, 4, 64, 64), r"images must be a tensor \[B, 3, H, W\]"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "images must be normalised floats"),
        ("cat.jpg", "images must be a tensor"),
    ],
)
def test_bad_images_get_one_clear_error(images, message):
    with pytest.raises(ValueError, match=message):
        tiny()(images)


def test_a_backbone_bound_to_one_size_says_so():
    model = tiny(backbone="beitv2_base_patch16_224", image_size=96)
    with pytest.raises(ValueError, match="position bias is bound to 96x96, got 128x96"):
        model(torch.randn(1, 3, 128, 96))
    assert segvit.predict(model, torch.randn(1, 3, 128, 96), mode="slide").shape == (1, 128, 96)


PUBLISHED = {  # GMAC and 10⁶ parameters, from the paper
    "segvit_base_ade20k_512": (120.9, 108.7),
    "segvit_large_ade20k_640": (637.9, 344.3),
    "segvit_large_shrunk_ade20k_640": (373.5, 344.6),
    "segvit_large_cocostuff10k_512": (383.9, 343.7),
    "segvit_large_shrunk_cocostuff10k_512": (224.8, 343.7),
    "segvit_large_pascal_context_480": (321.6, 343.5),
    "segvit_large_shrunk_pascal_context_480": (186.9, 343.4),
}


def test_published_models_cost_what_the_paper_says():
    infos = {info.name: info for info in segvit.list_models() if info.published}
    assert set(infos) == set(PUBLISHED)
    for name, (gmac, params) in PUBLISHED.items():
        assert infos[name].gmac == pytest.approx(gmac, rel=0.002), name
        assert infos[name].params_m == pytest.approx(params, rel=0.002), name


def test_light_and_edge_cost_what_was_promised():
    """Half of the full model at ViT-L 640, and with an eighth of the tokens kept at edges 42 percent less."""
    infos = {info.name: info for info in segvit.list_models()}
    assert infos["segvit_large_light_ade20k_640"].gmac <= 318.5
    assert infos["segvit_large_edge_ade20k_640"].gmac <= 368
    for size in ("base_{}_ade20k_512", "large_{}_ade20k_640"):
        light, edge = (infos["segvit_" + size.format(kind)].gmac for kind in ("light", "edge"))
        assert light < edge < infos["segvit_" + size.replace("_{}", "").format()].gmac


def test_modern_models_are_listed_with_licences():
    modern = [info.to_dict() for info in segvit.list_models() if not info.published]
    assert len(modern) >= 8
    for row in modern:
        assert row["licence"] != "unknown"
        assert row["gmac"] > 1
        assert row["params_m"] > 1


def test_the_counter_counts_what_it_should():
    """Against the formula, written out for a small model."""
    from segvit.models.complexity import count_multiply_adds

    C, D, N, L, depth, layers, H = 64, 32, 5, 16, 6, 3, 64
    with torch.device("meta"):
        model = tiny(backbone_kwargs=SMALL | {"class_token": False, "global_pool": ""})
    block = 12 * L * C * C + 2 * L * L * C + 2 * 5 * L * C
    layer = (
        4 * N * D * D + 2 * N * N * D + 2 * N * D * D + 2 * L * D * D + 2 * N * L * D + 8 * N * D * D + 3 * 5 * N * D
    )
    stage = L * C * D + 5 * L * D + layers * layer + N * D * (N + 1)
    decode = N * H * H * (N + 4)
    assert count_multiply_adds(model) == L * C * 3 * 256 + depth * block + 3 * stage + decode


def test_create_model_by_name():
    model = segvit.create_model(
        "segvit_base_ade20k_512", num_classes=4, image_size=64, out_indices=[1, 2, 3], backbone_kwargs=SMALL
    )
    assert model.num_classes == 4
    assert model.backbone.model.cls_token is None
    with pytest.raises(ValueError, match="there is no model 'segvit_base_ade20k'; near: segvit_base_ade20k_512"):
        segvit.create_model("segvit_base_ade20k")


def test_larger_models_cost_more():
    rows = {info.name: info for info in segvit.list_models()}
    names = ["segvit_small_dinov3_512", "segvit_base_dinov3_512", "segvit_large_dinov3_640"]
    for small, large in pairwise(names):
        assert rows[small].gmac < rows[large].gmac


def test_weights_of_another_model_are_called_so(tmp_path):
    save_file(timm.create_model("test_vit", embed_dim=32, num_heads=2).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(RuntimeError, match=r"cannot load .*w.safetensors: these are the weights of another model \("):
        segvit.SegViT("test_vit", 3, pretrained=str(tmp_path / "w.safetensors"))
