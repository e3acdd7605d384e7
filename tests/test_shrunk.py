"""Shrunk: down-sampling inside any backbone, edge tokens, up-sampling at any size."""

import warnings

import pytest
import torch
from test_models import FAMILIES, ROTARY, SMALL, tiny

import segvit
from segvit.losses import mixed_patches
from segvit.models.backbone import Backbone
from segvit.models.shrunk import EdgeSelector, query_downsample
from segvit.ops.reference.token_resample import stride_index


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "BEiT v2"])
def test_down_sampling_by_one_is_the_plain_block(family):
    name, kwargs = FAMILIES[family]
    backbone = Backbone(name, (5,), **kwargs).eval()
    images = torch.randn(2, 3, 70, 98)
    with torch.no_grad():
        x, grid, position = backbone._embed(backbone._pad(images))
        arguments = backbone._block_arguments(position, 2)
        want = backbone.model.blocks[2](x, **arguments)
        torch.testing.assert_close(query_downsample(backbone.model.blocks[2], x, grid, 1, **arguments), want)
        prefix, cells = backbone.model.num_prefix_tokens, grid[0] * grid[1]
        order = torch.stack([torch.randperm(cells), torch.arange(cells)])  # another of every image
        shuffled = query_downsample(backbone.model.blocks[2], x, grid, order, **arguments)
        rows = order[:, :, None].expand(-1, -1, x.shape[-1])
        torch.testing.assert_close(shuffled[:, prefix:], want[:, prefix:].gather(1, rows))
        torch.testing.assert_close(shuffled[:, :prefix], want[:, :prefix])


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "BEiT v2"])
def test_edge_aware_down_sampling_of_all_tokens_is_the_plain_backbone(family):
    """With every cell in the budget nothing is dropped: later blocks see the same tokens in another order."""
    name, kwargs = FAMILIES[family]
    backbone = Backbone(name, (1, 5), shrink=True, shrink_at=2, **kwargs).eval()
    images = torch.randn(2, 3, 70, 98)
    with torch.no_grad():
        features = backbone(images, EdgeSelector(64, 1.0))
        grid = features.grids[0]
        even = stride_index(grid, 2).expand(2, -1)
        cells = torch.cat([even, features.extra], 1)
        assert torch.equal(cells.sort(1).values, torch.arange(grid[0] * grid[1]).expand(2, -1))
        backbone.shrink_at = None
        want = backbone(images).tokens[1].gather(1, cells[:, :, None].expand(-1, -1, 64))
    torch.testing.assert_close(features.tokens[1], want)


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (3, 5), (12, 16)])
@pytest.mark.parametrize("budget", [0.01, 0.125, 1.0])
def test_edge_tokens_are_the_likeliest_and_none_lies_on_the_even_grid(grid, budget):
    select = EdgeSelector(8, budget)
    logits, chosen = select(torch.randn(3, grid[0] * grid[1], 8), grid)
    assert logits.shape == (3, *grid)
    free = torch.ones(grid, dtype=torch.bool)
    free[::2, ::2] = False
    assert chosen.shape == (3, min(round(budget * free.numel()), int(free.sum())))
    for b in range(3):
        assert len(chosen[b].unique()) == chosen.shape[1]
        assert free.flatten()[chosen[b]].all()
        others = free.flatten().clone()
        others[chosen[b]] = False
        if others.any() and chosen.shape[1]:
            assert logits[b].flatten()[chosen[b]].min() >= logits[b].flatten()[others].max()


def test_the_edge_head_learns_where_classes_meet():
    """A few steps on one picture: the tokens that are kept are the patches that hold both classes."""
    torch.manual_seed(0)
    labels = torch.zeros(1, 128, 128, dtype=torch.long)
    labels[:, 40:, 72:] = 1
    images = torch.randn(1, 3, 128, 128) * 0.1 + labels[:, None]
    model = tiny(2, image_size=128, shrink="edge")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = segvit.ATMLoss(2)
    edges = []
    for _ in range(60):
        terms = loss(model(images), labels)
        edges.append(terms.edge.item())
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
    assert edges[-1] < 0.2 * edges[0]
    truth, _ = mixed_patches(labels, labels >= 0, (8, 8))
    kept = model.eval().features(images).extra[0]
    free = truth.clone()
    free[:, ::2, ::2] = False
    found = truth[0].flatten()[kept].sum()
    assert found >= 0.9 * min(len(kept), free.sum())


def test_the_edge_head_learns_in_front_of_a_frozen_backbone():
    model = tiny(shrink="edge", freeze_backbone=True)
    segvit.ATMLoss(5)(model(torch.randn(2, 3, 64, 64)), torch.randint(0, 5, (2, 64, 64))).total.backward()
    assert all(p.grad is not None for p in model.select.parameters())
    assert all(p.grad is None for p in model.backbone.parameters())


def test_light_and_edge_say_nothing_at_any_size():
    for shrink in ("light", "edge"):
        model = tiny(shrink=shrink).eval()
        for size in ((16, 16), (1, 40), (150, 47), (96, 128)):
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("error")
                out = model(torch.randn(1, 3, *size))
            assert out.mask_logits.shape[-2:] == tuple(-(-side // 16) for side in size)
            assert segvit.predict(model, torch.randn(1, 3, *size)).shape == (1, *size)


@pytest.mark.parametrize("family", ["AugReg", *ROTARY, "DINOv2 with registers", "SigLIP"])
@pytest.mark.parametrize("size", [(96, 96), (70, 98)])
@pytest.mark.parametrize("shrink", ["v1", "light", "edge"])
def test_shrunk_runs_on_every_family_at_odd_grids(family, size, shrink):
    name, kwargs = FAMILIES[family]
    model = tiny(backbone=name, shrink=shrink, backbone_kwargs=kwargs, image_size=112)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(torch.randn(2, 3, *size))
    patch = model.backbone.patch_size[0]
    grid = tuple(-(-n // patch) for n in size)
    assert out.mask_logits.shape == (3 if shrink == "v1" else 2, 2, 5, *grid)
    features = model.features(torch.randn(1, 3, *size))
    assert features.grids == [grid, tuple(-(-n // 2) for n in grid)]
    assert (out.edge_logits is None) == (features.extra is None) == (shrink != "edge")
    segvit.ATMLoss(5)(out, torch.randint(0, 5, (2, *size))).total.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_shrunk_says_once_that_its_position_queries_are_interpolated():
    model = tiny(shrink="v1")
    with pytest.warns(UserWarning, match="position queries for a 4x4 grid; they are interpolated to 6x8"):
        model(torch.randn(1, 3, 96, 128))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(1, 3, 96, 128))


def test_down_sampling_refuses_blocks_it_cannot_take_over():
    for name in ("beitv2_base_patch16_224", "vit_medium_patch16_gap_256"):
        if name.startswith("beit"):
            with pytest.raises(ValueError, match=r"shrink: this backbone cannot be down-sampled: its blocks are timm"):
                Backbone(name, shrink=True, **SMALL)
        else:
            Backbone(name, shrink=True, **SMALL)
    with pytest.raises(ValueError, match="cannot be down-sampled"):
        Backbone("vit_base_patch16_xp_224", shrink=True, embed_dim=64, depth=6, num_heads=2)


@pytest.mark.parametrize("size", [(64, 96), (50, 70)])
def test_edge_patches_are_those_of_the_models_logits(size):
    model = tiny(shrink="edge")
    out = model(torch.randn(1, 3, *size))
    assert model.edge_patches(size) == (tuple(out.edge_logits.shape[1:]), out.extent)
    assert tiny().edge_patches(size) is None
