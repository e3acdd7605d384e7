"""Any plain ViT of timm as a backbone: its own tokens after chosen blocks, at any image size."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models import is_model_in_modules
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segvit.models.shrunk import STRIDE, EdgeSelector, check_block, keep_positions, query_downsample
from segvit.ops.reference.token_resample import ceil_div, stride_index

FAMILIES = ("vision_transformer", "deit", "eva", "beit")  # timm modules of plain ViTs


class Features(NamedTuple):
    tokens: list[Tensor]  # after each of out_indices, shallow to deep: [B, h_i·w_i, C], without prefix tokens
    grids: list[tuple[int, int]]  # (h_i, w_i); where edge tokens were kept, of the even grid alone
    extra: Tensor | None = None  # [B, E] cells of the first grid whose tokens lie behind the even grid's
    edge_logits: Tensor | None = None  # [B, h, w] float32, of the grid before down-sampling


class Backbone(nn.Module):
    """A plain ViT of timm, cut behind the last block that is needed; images are padded inside to the patch size.

    Args:
        name: a timm model name ("vit_base_patch16_384.augreg_in21k_ft_in1k"), or "hf-hub:ORGANISATION/NAME".
        out_indices: blocks whose tokens are returned, from 0; None: 5, 7, 11 of 12, else thirds of the depth; with
            `shrink` the block before down-sampling and the last.
        image_size: (height, width) of the stored positions, rounded up to the patch size; None: the model's own.
        in_chans: image channels.
        drop_path: stochastic depth, rising linearly to this rate over the blocks.
        pretrained: True loads timm's weights for `name`, a path loads that file (timm's layout, safetensors or .pth).
        shrink: one block becomes query-based down-sampling by 2.
        shrink_at: which; None: the one after a third of the depth (8 of 24).
        final_norm: keep the model's last norm, on the deepest feature.
        pos_antialias: how position embeddings are interpolated (bicubic): timm's way (True) or the official SegViT's.
        activation_checkpointing: recompute the blocks in backward instead of keeping their activations.
        frozen: no gradients, and evaluation mode for good.
        kwargs: further arguments of the timm model, such as embed_dim, depth, num_heads, patch_size.

    Raises:
        ValueError: an unknown name, a model that is no plain ViT, indices outside it, a block that cannot shrink.
        RuntimeError: weights that cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] | None = None,
        image_size: tuple[int, int] | None = None,
        in_chans: int = 3,
        drop_path: float = 0.0,
        pretrained: bool | str = False,
        shrink: bool = False,
        shrink_at: int | None = None,
        final_norm: bool = False,
        pos_antialias: bool = True,
        activation_checkpointing: bool = False,
        frozen: bool = False,
        **kwargs,
    ):
        super().__init__()
        sizes = {}
        if image_size is not None:  # a size that the patches do not divide is padded, so the stored grid is rounded up
            patch = _patch_size(name, kwargs)
            sizes = {"img_size": tuple(-(-size // side) * side for size, side in zip(image_size, patch))}
        self.model = _create(name, pretrained, in_chans=in_chans, drop_path_rate=drop_path, **sizes, **kwargs)
        depth = len(self.model.blocks)
        self.shrink_at = (depth // 3 if shrink_at is None else shrink_at) if shrink else None
        if shrink and not 0 < self.shrink_at < depth:
            raise ValueError(f"shrink_at must be a block number from 1 to {depth - 1}, got {self.shrink_at}")
        if out_indices is None:
            thirds = (5, 7, 11) if depth == 12 else [depth * (i + 1) // 3 - 1 for i in range(3)]
            out_indices = [self.shrink_at - 1, depth - 1] if shrink else thirds
        self.out_indices = tuple(int(i) for i in out_indices)
        ascending = sorted(set(self.out_indices))
        if not ascending or list(self.out_indices) != ascending or ascending[0] < 0 or ascending[-1] >= depth:
            raise ValueError(
                f"out_indices must be ascending block numbers from 0 to {depth - 1}, got {list(self.out_indices)}"
            )
        self.pos_antialias = pos_antialias
        self.activation_checkpointing = activation_checkpointing
        self.frozen = frozen
        self.embed_dim: int = self.model.embed_dim
        self.patch_size: tuple[int, int] = tuple(self.model.patch_embed.patch_size)
        self.image_size: tuple[int, int] = tuple(self.model.patch_embed.img_size)
        self.fixed_size = isinstance(self.model, Beit)  # its position bias is bound to one grid
        plain = (
            isinstance(self.model, VisionTransformer) and not self.model.no_embed_class and self.model.reg_token is None
        )
        if not pos_antialias and not plain:
            raise ValueError(f"pos_antialias=False is the official ViT's way; {name!r} has positions of another kind")
        if shrink:
            check_block(self.model.blocks[self.shrink_at])
        self._cut(final_norm)
        if frozen:
            self.requires_grad_(False).eval()

    def _cut(self, final_norm: bool) -> None:
        """Remove what no feature depends on: it would get no gradient, and distributed training would wait for it."""
        self.model.blocks = self.model.blocks[: self.out_indices[-1] + 1]
        self.model.reset_classifier(0, "")
        if not final_norm:
            self.model.norm = nn.Identity()
        self.model.fc_norm = nn.Identity()
        if hasattr(self.model, "attn_pool"):
            self.model.attn_pool = None

    @property
    def grid(self) -> tuple[int, int]:
        """Patch grid (h, w) at image_size."""
        return tuple(self.model.patch_embed.grid_size)

    def train(self, mode: bool = True) -> "Backbone":
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor, select: EdgeSelector | None = None) -> Features:
        """images [B, C, H, W], normalised; any H and W. `select` says which tokens stay beside the even grid."""
        learn = torch.is_grad_enabled()
        with torch.set_grad_enabled(learn and not (self.frozen and not images.requires_grad)):
            return self._forward(images, select, learn)

    def _forward(self, images: Tensor, select: EdgeSelector | None, learn: bool) -> Features:
        x, grid, position = self._embed(self._pad(images))
        prefix = self.model.num_prefix_tokens
        features = Features([], [])
        for i, block in enumerate(self.model.blocks):
            arguments = self._block_arguments(position, i)
            if i == self.shrink_at:
                keep = STRIDE
                if select is not None:
                    with torch.set_grad_enabled(learn):  # it learns in front of a frozen backbone, too
                        edge_logits, extra = select(x[:, prefix:], grid)
                    features = features._replace(extra=extra, edge_logits=edge_logits)
                    even = stride_index(grid, STRIDE, x.device).expand(x.shape[0], -1)
                    keep = torch.cat([even, extra], 1)
                if self.activation_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(query_downsample, block, x, grid, keep, use_reentrant=False, **arguments)
                else:
                    x = query_downsample(block, x, grid, keep, **arguments)
                if position is not None:
                    position = keep_positions(position, grid, keep)
                grid = tuple(ceil_div(side, STRIDE) for side in grid)
            elif self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, **arguments)
            else:
                x = block(x, **arguments)
            if i in self.out_indices:
                deepest = i == self.out_indices[-1]
                features.tokens.append((self.model.norm(x) if deepest else x)[:, prefix:])
                features.grids.append(grid)
        return features

    def _pad(self, images: Tensor) -> Tensor:
        """Zeros right and bottom, up to the patch size (for BEiT, up to its one size)."""
        H, W = images.shape[-2:]
        if self.fixed_size:
            height, width = self.image_size
            if height < H or width < W:
                raise ValueError(
                    f"images: this backbone's position bias is bound to {height}x{width}, got {H}x{W}; "
                    'use predict(mode="slide"), or build the model with a larger image_size'
                )
        else:
            height, width = (ceil_div(size, patch) * patch for size, patch in zip((H, W), self.patch_size))
        if not torch.compiler.is_exporting() and (height, width) == (H, W):  # a program for any size cannot ask
            return images
        return F.pad(images, (0, width - W, 0, height - H))

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int], Tensor | None]:
        """Tokens [B, P + h·w, C], the grid (h, w), and what the blocks get beside them: rotary or bias tables."""
        model = self.model
        x = model.patch_embed(images)
        if isinstance(model, Beit):
            x = torch.cat([model.cls_token.expand(x.shape[0], -1, -1), x], 1)
            x = model.pos_drop(x if model.pos_embed is None else x + model.pos_embed)
            return x, self.grid, model.rel_pos_bias() if model.rel_pos_bias is not None else None
        grid = tuple(x.shape[1:3])
        if isinstance(model, Eva):
            x, rope = model._pos_embed(x)
            return model.norm_pre(x), grid, rope
        if self.pos_antialias:
            return model.norm_pre(model._pos_embed(x)), grid, None
        x = x.flatten(1, 2)
        if model.cls_token is not None:
            x = torch.cat([model.cls_token.expand(x.shape[0], -1, -1), x], 1)
        position = resize_pos_embed(model.pos_embed, grid, self.grid, model.num_prefix_tokens)
        return model.norm_pre(model.pos_drop(x + position)), grid, None

    def _block_arguments(self, position: Tensor | None, i: int) -> dict[str, Tensor | None]:
        if isinstance(self.model, Beit):
            return {"shared_rel_pos_bias": position}
        if isinstance(self.model, Eva):
            return {"rope": position[i] if self.model.rope_mixed else position}
        return {}


def resize_pos_embed(
    pos_embed: Tensor,  # [1, P + h·w, C]
    grid: tuple[int, int],
    old_grid: tuple[int, int],
    prefix: int,
) -> Tensor:  # [1, P + h'·w', C]
    """Position embeddings on another grid, as the official implementation has it: bicubic, without antialiasing."""
    return resample_abs_pos_embed(pos_embed, list(grid), list(old_grid), num_prefix_tokens=prefix, antialias=False)


def _create(name: str, pretrained: bool | str, **kwargs) -> nn.Module:
    """The timm model, with its weights when asked for."""
    local = name.startswith("hf-hub:")
    if not local and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(f"backbone: timm has no model {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
    if not local and not is_model_in_modules(name, FAMILIES):
        raise ValueError(f"backbone: {name!r} is no plain ViT; any timm model of {', '.join(FAMILIES)} works")
    if isinstance(pretrained, (str, Path)):
        if not Path(pretrained).is_file():
            raise ValueError(f"pretrained: there is no file {str(pretrained)!r}")
        weights = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(pretrained)}}
    else:
        weights = {"pretrained": bool(pretrained)}
    if weights["pretrained"] and kwargs.get("class_token") is False:
        return _without_class_token(name, weights, kwargs)
    return _build(name, weights, kwargs)


def _patch_size(name: str, kwargs: dict) -> tuple[int, int]:
    """(height, width) of the patches, known before the backbone is built at its size."""
    with torch.device("meta"):
        return tuple(_create(name, False, **kwargs).patch_embed.patch_size)


def _build(name: str, weights: dict, kwargs: dict) -> nn.Module:
    fixed = not name.startswith("hf-hub:") and is_model_in_modules(name, ["beit"])
    dynamic = {} if fixed else {"dynamic_img_size": True}
    try:
        model = timm.create_model(name, **weights, **dynamic, **kwargs)
    except Exception as error:  # timm raises what its weight readers raise, which is nearly everything
        if isinstance(error, TypeError | AssertionError):
            raise ValueError(f"backbone: {name!r} cannot be built with {kwargs}: {error}") from error
        if not weights["pretrained"]:
            raise
        source = weights.get("pretrained_cfg_overlay", {}).get("file", "its pretrained weights")
        reason = " ".join(str(error).split())[:300]
        if "size mismatch" in str(error) or "Missing key" in str(error):
            reason = f"these are the weights of another model ({reason[:120]} …)"
        remedy = "" if "pretrained_cfg_overlay" in weights else "; pretrained may also be a weights file, or false"
        raise RuntimeError(f"backbone: {name!r} cannot load {source}: {reason}{remedy}") from error
    if not isinstance(model, (VisionTransformer, Eva, Beit)):
        raise ValueError(f"backbone: {name!r} is a {type(model).__name__}, no plain ViT")
    return model


def _without_class_token(name: str, weights: dict, kwargs: dict) -> nn.Module:
    """Pretrained weights for a model that drops their class token, as the official layout does."""
    donor = _build(name, weights, {k: v for k, v in kwargs.items() if k != "class_token"})
    state = donor.state_dict()
    state.pop("cls_token")
    state["pos_embed"] = state["pos_embed"][:, donor.num_prefix_tokens :]
    model = _build(name, {"pretrained": False}, {"global_pool": "", **kwargs})
    model.load_state_dict({k: v for k, v in state.items() if k in model.state_dict()}, strict=False)
    return model
