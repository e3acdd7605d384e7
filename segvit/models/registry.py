"""Models by name: the paper's seven, our Shrunk ones, and modern backbones of timm."""

import difflib
import functools
from dataclasses import dataclass, field

import timm
import torch

from segvit.models.complexity import count_multiply_adds, count_parameters
from segvit.models.segvit import SegViT


@dataclass(frozen=True)
class ModelInfo:
    """A model by name. What is measured (gmac, params_m) is counted from the model when it is first asked for."""

    name: str
    published: bool  # one of the seven models of arXiv 2210.05844
    arguments: dict = field(repr=False)  # of SegViT

    @property
    def backbone(self) -> str:
        return self.arguments["backbone"]

    @property
    def image_size(self) -> tuple[int, int]:
        return self.arguments["image_size"], self.arguments["image_size"]

    @property
    def num_classes(self) -> int:
        return self.arguments["num_classes"]

    @property
    def licence(self) -> str:
        """Of the backbone's pretrained weights, as timm states it."""
        config = timm.get_pretrained_cfg(self.backbone)
        return (config.license if config else None) or "unknown"

    @property
    def gmac(self) -> float:
        """10⁹ multiply-adds of one image of image_size, from the input to the label map."""
        return _measured(self.name)[0] / 1e9

    @property
    def params_m(self) -> float:
        """10⁶ parameters."""
        return _measured(self.name)[1] / 1e6

    def to_dict(self) -> dict:
        """Everything, ready for JSON."""
        names = ("name", "published", "backbone", "image_size", "num_classes", "gmac", "params_m", "licence")
        return {name: getattr(self, name) for name in names}


# The published models drop the class token, and interpolate position embeddings without antialiasing.
_OFFICIAL = {"pos_antialias": False, "backbone_kwargs": {"class_token": False, "global_pool": ""}}
_BASE = {"backbone": "vit_base_patch16_384.augreg_in21k_ft_in1k", "out_indices": [5, 7, 11], "drop_path": 0.1}
_LARGE = {"backbone": "vit_large_patch16_384.augreg_in21k_ft_in1k", "out_indices": [7, 15, 23], "drop_path": 0.3}
_SHRUNK = _LARGE | {"out_indices": [7, 23], "shrink": "v1", "shrink_at": 8}
_PUBLISHED = {
    "segvit_base_ade20k_512": _BASE | {"image_size": 512, "num_classes": 150},
    "segvit_large_ade20k_640": _LARGE | {"image_size": 640, "num_classes": 150},
    "segvit_large_shrunk_ade20k_640": _SHRUNK | {"image_size": 640, "num_classes": 150},
    "segvit_large_cocostuff10k_512": _LARGE | {"image_size": 512, "num_classes": 171},
    "segvit_large_shrunk_cocostuff10k_512": _SHRUNK | {"image_size": 512, "num_classes": 171},
    "segvit_large_pascal_context_480": _LARGE | {"image_size": 480, "num_classes": 60},
    "segvit_large_shrunk_pascal_context_480": _SHRUNK | {"image_size": 480, "num_classes": 60},
}
_OURS = {  # Shrunk with our own up-sampling, and with edge tokens
    "segvit_base_light_ade20k_512": _BASE
    | {"out_indices": None, "image_size": 512, "num_classes": 150, "shrink": "light"},
    "segvit_base_edge_ade20k_512": _BASE
    | {"out_indices": None, "image_size": 512, "num_classes": 150, "shrink": "edge"},
    "segvit_large_light_ade20k_640": _SHRUNK | {"image_size": 640, "num_classes": 150, "shrink": "light"},
    "segvit_large_edge_ade20k_640": _SHRUNK | {"image_size": 640, "num_classes": 150, "shrink": "edge"},
}
_MODERN = {
    "segvit_tiny_augreg_512": ("vit_tiny_patch16_384.augreg_in21k_ft_in1k", 512),
    "segvit_small_dinov3_512": ("vit_small_patch16_dinov3.lvd1689m", 512),
    "segvit_base_dinov3_512": ("vit_base_patch16_dinov3.lvd1689m", 512),
    "segvit_large_dinov3_640": ("vit_large_patch16_dinov3.lvd1689m", 640),
    "segvit_small_dinov2_518": ("vit_small_patch14_reg4_dinov2.lvd142m", 518),
    "segvit_base_dinov2_518": ("vit_base_patch14_reg4_dinov2.lvd142m", 518),
    "segvit_base_eva02_448": ("eva02_base_patch14_448.mim_in22k_ft_in22k_in1k", 448),
    "segvit_base_beitv2_512": ("beitv2_base_patch16_224.in1k_ft_in22k_in1k", 512),
    "segvit_base_deit3_512": ("deit3_base_patch16_384.fb_in22k_ft_in1k", 512),
    "segvit_base_siglip2_512": ("vit_base_patch16_siglip_512.v2_webli", 512),
}


def _infos() -> dict[str, ModelInfo]:
    published = [ModelInfo(name, True, _OFFICIAL | arguments) for name, arguments in _PUBLISHED.items()]
    modern = [
        ModelInfo(name, False, {"backbone": backbone, "image_size": size, "num_classes": 150})
        for name, (backbone, size) in _MODERN.items()
    ]
    ours = [ModelInfo(name, False, _OFFICIAL | arguments) for name, arguments in _OURS.items()]
    return {info.name: info for info in (*published, *ours, *modern)}


@functools.cache
def _measured(name: str) -> tuple[int, int]:
    """(multiply-adds, parameters) of a named model."""
    with torch.device("meta"):
        model = SegViT(**_infos()[name].arguments)
    return count_multiply_adds(model), count_parameters(model)


def list_models() -> list[ModelInfo]:
    """The paper's seven models, ours of less cost, then modern backbones.

    Each has image_size, num_classes, gmac, params_m and licence.

    The weights that `create_model(name, pretrained=True)` loads are the backbone's, under `licence`. The authors'
    trained checkpoints have a non-commercial licence of their own; `segvit.from_official` loads them.
    """
    return list(_infos().values())


def create_model(name: str, **overrides) -> SegViT:
    """Build a model of `list_models()` by name; `overrides` are arguments of SegViT.

    Raises:
        ValueError: an unknown name (the nearest are named), or an argument that SegViT refuses.
    """
    infos = _infos()
    if name not in infos:
        near = difflib.get_close_matches(str(name), infos, n=3, cutoff=0.3)
        raise ValueError(f"there is no model {name!r}; near: {', '.join(near or infos)}; see segvit.list_models()")
    arguments = infos[name].arguments | overrides
    kwargs = (infos[name].arguments.get("backbone_kwargs") or {}) | (overrides.get("backbone_kwargs") or {})
    arguments["backbone_kwargs"] = kwargs
    return SegViT(**arguments)
