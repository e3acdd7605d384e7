"""Multiply-adds and parameters, counted from the model on the meta device: nothing is computed, nothing is typed in."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import segvit.ops

aten, ours = torch.ops.aten, torch.ops.segvit
# FlopCounterMode counts two floating-point operations per multiply-add, so what is counted per element is doubled here.
PER_LAYER_NORM_ELEMENT = 5
PER_RESIZED_ELEMENT = 4


def _layer_norm(shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * PER_LAYER_NORM_ELEMENT * _numel(shape)


def _atm(q_shape, k_shape, *args, out_shape=None, **kwargs) -> int:
    """Both matmuls of the attention; its mask is a by-product of the first."""
    return 2 * 2 * _numel(q_shape) * k_shape[1]


def _mask_decode(mask_shape, probs_shape, height, width, *args, out_shape=None, **kwargs) -> int:
    B, N, K = probs_shape
    return 2 * B * N * height * width * (K + PER_RESIZED_ELEMENT)


def _numel(shape) -> int:
    return torch.Size(shape).numel()


COUNTED = {
    aten.native_layer_norm: _layer_norm,
    ours.atm: _atm,
    ours.mask_decode: _mask_decode,
}


def count_multiply_adds(model: nn.Module, image_size: tuple[int, int] | None = None) -> int:
    """Multiply-adds of one image of `image_size` (default: the model's), from the input to the label map.

    Counted: linears, convolutions, both matmuls of every attention, the contraction of masks with class probabilities
    over all N·K pairs at full resolution, 5 per element of a LayerNorm and 4 per bilinearly resized element.
    The model must be on the meta device: `with torch.device("meta"): model = SegViT(...)`.
    """
    height, width = image_size or model.image_size
    images = torch.empty(1, len(model.mean), height, width, device="meta")
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        out = model.eval()(images)
        probs = out.class_logits[-1].softmax(-1)[..., :-1]
        segvit.ops.mask_decode(out.mask_logits[-1].detach(), probs.detach(), (height, width), extent=out.extent)
    return counter.get_total_flops() // 2


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
