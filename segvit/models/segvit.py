"""SegViT: a plain ViT and the ATM decoder behind it."""

import contextlib
import io
import math
import re
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from segvit.models.backbone import Backbone, Features
from segvit.models.decoder import ATMDecoder, init_decoder, join_tokens
from segvit.models.shrunk import EdgeSelector, LightUpsample, QueryUpsample

MODEL_CARD = """---
{{ card_data }}
---
A [SegViT](https://arxiv.org/abs/2210.05844) for semantic segmentation, trained with the library `segvit`.

```python
import segvit

model = segvit.SegViT.from_pretrained("{{ repo_id | default("ORGANISATION/NAME") }}")
labels = segvit.predict(model, "photo.jpg")  # [1, H, W] class numbers, named in model.class_names
```

Its backbone's pretrained weights and its training data have licences of their own.
"""


class SegViTOutput(NamedTuple):
    """What a SegViT says of images, for ATMLoss: one class and one mask for each class token, at every stage."""

    class_logits: Tensor  # [S, B, N, K+1] float32; the last column is "no object"; the last stage is the final one
    mask_logits: Tensor  # [S, B, N, h, w] float32
    extent: tuple[float, float]  # rows and columns of the mask grid that the image covers: (H / patch, W / patch)
    edge_logits: Tensor | None = None  # [B, h, w] float32, with shrink="edge": the patch holds more than one class


class SegViT(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="segvit",
    tags=["segvit", "semantic-segmentation"],
    pipeline_tag="image-segmentation",
    paper_url="https://arxiv.org/abs/2210.05844",
    model_card_template=MODEL_CARD,
):
    """Semantic segmentation with a plain Vision Transformer (SegViT, arXiv 2210.05844).

    Args:
        backbone: any plain ViT of timm by name, or "hf-hub:ORGANISATION/NAME".
        num_classes: K; one class token each.
        image_size: (height, width), or one int, of the stored grids and of the default crop; images may have any size.
            None: the backbone's own.
        in_chans: image channels.
        out_indices: blocks whose tokens the decoder attends to, from 0; None: 5, 7, 11 of 12, else thirds of the depth,
            with `shrink` the block before down-sampling and the last.
        decoder_dim: C'; None: half the backbone's width.
        decoder_heads: None: decoder_dim / 32.
        decoder_layers: per stage.
        shrink: query-based down-sampling inside the backbone, and up-sampling behind it. "v1": the paper's, 40 % fewer
            multiply-adds; "light": with a light up-sampling that fits any image size, 50 % fewer; "edge": light, and
            tokens at the edges of objects stay, 43 % fewer. None: none.
        shrink_at: the block that becomes the down-sampling; None: a third of the depth.
        edge_budget: with "edge", the share of the grid's tokens that stay beside every second of every second row. What
            chooses them learns from ATMLoss; another loss must use out.edge_logits, too.
        dropout: of the decoder: attention weights, residuals, FFN.
        drop_path: stochastic depth of the backbone, rising to this rate at its last block.
        pretrained: True loads timm's weights of the backbone, a path loads that file (timm's layout).
        class_names: K names, kept in the configuration for legends and tables.
        mean, std: per channel, of images scaled to 0…1; None: what the backbone was trained with.
        activation_checkpointing: recompute the backbone's blocks in backward, for memory.
        freeze_backbone: train the decoder alone.
        final_norm: keep the backbone's last norm, on the deepest feature.
        pos_antialias: interpolate position embeddings as timm does (True) or as the official SegViT does.
        added: how many of the classes, the last ones, were added to a trained model, a number each time: they have
            class tokens and a decoder of their own, and all but the newest of these is frozen. See segvit.add_classes.
        backbone_kwargs: further arguments of the timm model, such as embed_dim, depth or patch_size.

    Raises:
        ValueError: an argument that does not fit, named, with what was expected.
        RuntimeError: weights that cannot be loaded.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        image_size: int | Sequence[int] | None = None,
        in_chans: int = 3,
        out_indices: Sequence[int] | None = None,
        decoder_dim: int | None = None,
        decoder_heads: int | None = None,
        decoder_layers: int = 3,
        shrink: str | None = None,
        shrink_at: int | None = None,
        edge_budget: float = 0.125,
        dropout: float = 0.1,
        drop_path: float = 0.1,
        pretrained: bool | str = False,
        class_names: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        activation_checkpointing: bool = False,
        freeze_backbone: bool = False,
        final_norm: bool = False,
        pos_antialias: bool = True,
        added: Sequence[int] = (),
        backbone_kwargs: dict | None = None,
    ):
        super().__init__()
        _check(num_classes, in_chans, decoder_layers, shrink, edge_budget, dropout, drop_path, class_names, added)
        kwargs = dict(backbone_kwargs or {})
        self.backbone = Backbone(
            backbone,
            out_indices,
            as_pair("image_size", image_size),
            in_chans,
            drop_path,
            pretrained,
            shrink is not None,
            shrink_at,
            final_norm,
            pos_antialias,
            activation_checkpointing,
            freeze_backbone or bool(added),
            **kwargs,
        )
        self.num_classes = num_classes
        self.class_names = list(class_names) if class_names else [f"class {i}" for i in range(num_classes)]
        width = self.backbone.embed_dim
        dim = width // 2 if decoder_dim is None else decoder_dim
        heads = max(dim // 32, 1) if decoder_heads is None else decoder_heads
        if dim < 1 or heads < 1 or dim % heads:
            raise ValueError(f"decoder_heads must divide decoder_dim, got {heads} and {dim}")
        self.select = self.upsample = None
        if shrink:
            shrink_at = self.backbone.shrink_at
            if len(self.backbone.out_indices) != 2 or not self.backbone.out_indices[0] < shrink_at:
                raise ValueError(
                    f"out_indices must be one block before shrink_at = {shrink_at} and one from it on, "
                    f"got {list(self.backbone.out_indices)}"
                )
            if shrink == "v1":
                self.upsample = QueryUpsample(width, dim, heads, decoder_layers, self.backbone.grid, dropout)
            else:
                self.upsample = LightUpsample(width, dim)
            init_decoder(self.upsample)
            if shrink == "edge":
                self.select = EdgeSelector(width, edge_budget)
                init_decoder(self.select)
        stages = 0 if shrink == "v1" else len(self.backbone.out_indices)
        first, *later = (
            ATMDecoder(width, dim, classes, heads, decoder_layers, stages, dropout, project=not shrink)
            for classes in (num_classes - sum(added), *added)
        )
        self.decoder, self.added = first, nn.ModuleList(later)
        init_decoder(self.decoder)
        init_decoder(self.added)
        for part in self._frozen_parts():
            part.requires_grad_(False).eval()
        self._set_normalisation(mean, std, in_chans)
        if getattr(self, "_hub_mixin_config", None):  # a saved model brings its own weights
            self._hub_mixin_config["pretrained"] = False

    def _set_normalisation(self, mean, std, in_chans: int) -> None:
        config = self.backbone.model.pretrained_cfg or {}
        for name, given in (("mean", mean), ("std", std)):
            values = given if given is not None else config.get(name, (0.5,) * 3)
            if given is None and len(values) != in_chans:
                values = (0.5,) * in_chans
            if len(values) != in_chans:
                raise ValueError(f"{name} must have one value per channel ({in_chans}), got {list(values)}")
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)

    def _apply(self, fn, recurse: bool = True) -> "SegViT":
        """A cast to half precision leaves float32 what it would spoil: mean, std, and frequencies of rotary positions.

        The positions would multiply the errors of their frequencies.
        """
        rope = getattr(self.backbone.model, "rope", None)
        exact = [
            (module, name, value.detach())
            for module in (self, *([] if rope is None else [rope]))
            for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        ]
        super()._apply(fn, recurse)
        for module, name, value in exact:
            cast = getattr(module, name)
            if cast.dtype in (torch.float16, torch.bfloat16):
                cast.data = value.to(cast.device, torch.float32)
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "SegViT":
        """A saved model, in evaluation mode: a folder of save_pretrained, a run of `segvit train` (its best), or a name

        on the Hugging Face Hub. Raises FileNotFoundError where a folder is meant that is not there.
        """
        name, folder = pretrained_model_name_or_path, Path(pretrained_model_name_or_path)
        if (folder / "best" / "config.json").is_file():
            name = folder / "best"
        elif not (folder / "config.json").is_file() and (folder.is_dir() or str(name).count("/") != 1):
            raise FileNotFoundError(f"{name}: no saved model there (config.json and model.safetensors)")
        return super().from_pretrained(name, **kwargs)

    @classmethod
    def _from_pretrained(cls, **kwargs) -> "SegViT":
        with contextlib.redirect_stdout(io.StringIO()):  # the mixin prints, and `segvit … --json` must print JSON alone
            return super()._from_pretrained(**kwargs)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the stored grids and of the default crop."""
        return self.backbone.image_size

    def features(self, images: Tensor) -> Features:
        """The backbone's tokens [B, h·w, C] after each of out_indices, and their grids.

        With shrink="edge" the kept edge tokens lie behind the even grid's, and `extra` has their cells.
        """
        return self.backbone(images, self.select)

    def forward(self, images: Tensor) -> SegViTOutput:
        """images [B, C, H, W]: float, normalised with `mean` and `std`; any H and W (padded to the patch size).

        Raises ValueError for images of another shape, number of channels or dtype.
        """
        in_chans = len(self.mean)
        if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != in_chans or 0 in images.shape:
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images must be a tensor [B, {in_chans}, H, W], got {got}")
        if not images.is_floating_point():
            raise ValueError(f"images must be normalised floats, got {images.dtype}; predict() takes raw images too")
        features = self.backbone(images, self.select)
        h, w = features.grids[0]
        tokens = features.tokens
        if self.upsample is not None:
            tokens = self.upsample(tokens, (h, w), features.extra)
        class_logits, mask_logits = join_tokens([decoder(tokens) for decoder in (self.decoder, *self.added)])
        patch = self.backbone.patch_size
        extent = (images.shape[2] / patch[0], images.shape[3] / patch[1])
        return SegViTOutput(class_logits, mask_logits.unflatten(-1, (h, w)), extent, features.edge_logits)

    def edge_patches(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[float, float]] | None:
        """Grid of the edge logits of images of this size, and the part of it that they cover; None: no edge logits."""
        if self.select is None:
            return None
        extent = tuple(side / patch for side, patch in zip(size, self.backbone.patch_size))
        return tuple(math.ceil(cells) for cells in extent), extent

    @property
    def learned_classes(self) -> range | None:
        """Numbers of the classes that learn, where others are frozen (for ATMLoss); None: all."""
        return range(self.num_classes - self.added[-1].num_classes, self.num_classes) if self.added else None

    def _frozen_parts(self) -> list[nn.Module]:
        """What was there before the newest classes, beside the backbone."""
        parts = [self.select, self.upsample, self.decoder, *self.added[:-1]] if self.added else []
        return [part for part in parts if part is not None]

    def train(self, mode: bool = True) -> "SegViT":
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        return self

    def parameter_groups(
        self,
        lr: float = 2e-5,
        weight_decay: float = 0.01,
        decoder_lr: float = 10.0,
        layer_decay: float | None = None,
    ) -> list[dict]:
        """The paper's groups for AdamW: decoder at decoder_lr × lr, the backbone's norms without weight decay.

        With layer_decay, block i of n learns at lr × layer_decay^(n − 1 − i), and what is before the blocks at lr ×
        layer_decay^n, as is usual where a pretrained ViT is tuned.
        """
        norms = {
            id(p) for m in self.backbone.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters(recurse=False)
        }
        depth = len(self.backbone.model.blocks)
        groups: dict[tuple, dict] = {}
        for name, p in self.named_parameters():
            if not p.requires_grad:
                continue
            body, norm = name.startswith("backbone."), id(p) in norms
            block = re.match(r"backbone\.model\.blocks\.(\d+)\.", name)
            below = 0  # blocks between this parameter and the features
            if body and layer_decay is not None and not name.startswith("backbone.model.norm."):
                below = depth - 1 - int(block[1]) if block else depth
            rate = lr * (layer_decay**below if below else 1) * (1 if body else decoder_lr)
            own = {"params": [], "lr": rate, "weight_decay": 0.0 if norm else weight_decay}
            groups.setdefault((not body, below, norm), own)["params"].append(p)
        return [groups[key] for key in sorted(groups)]


def _check(num_classes, in_chans, decoder_layers, shrink, edge_budget, dropout, drop_path, class_names, added) -> None:
    for name, value in (("num_classes", num_classes), ("in_chans", in_chans), ("decoder_layers", decoder_layers)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if shrink not in (None, "v1", "light", "edge"):
        raise ValueError(f'shrink must be None, "v1", "light" or "edge", got {shrink!r}')
    if not isinstance(edge_budget, int | float) or not 0 < edge_budget <= 1:
        raise ValueError(f"edge_budget must be in (0, 1], got {edge_budget!r}")
    for name, value in (("dropout", dropout), ("drop_path", drop_path)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value!r}")
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"class_names must have num_classes = {num_classes} names, got {len(class_names)}")
    counts = isinstance(added, Sequence) and all(isinstance(n, int) and n > 0 for n in added)
    if not counts or sum(added) >= num_classes:
        raise ValueError(f"added must be numbers of classes, fewer than num_classes = {num_classes}, got {added!r}")


def as_pair(name: str, value: int | Sequence[int] | None) -> tuple[int, int] | None:
    """(height, width) of an int or a pair; None stays None. Raises ValueError for anything else."""
    if value is None:
        return None
    pair = tuple(value) if isinstance(value, Sequence | torch.Size) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, Integral) and v > 0 for v in pair):
        raise ValueError(f"{name} must be an int or (height, width), got {value!r}")
    return int(pair[0]), int(pair[1])
