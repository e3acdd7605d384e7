"""atm: attention whose similarity is the mask. Contract, backends and autograd; the formula is in reference/atm.py."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _checks
from ._dispatch import autocast_dtype, choose, is_plain, triton_missing, without_autocast
from ._library import below_autograd, register
from .reference import atm as reference_atm
from .reference.atm import atm_backward as reference_backward


def atm(
    q: Tensor,  # [B, N, C]
    k: Tensor,  # [B, L, C]
    v: Tensor,  # [B, L, C]
    num_heads: int,
    scale: float | None = None,
    dropout_p: float = 0.0,
    mask_carry: Tensor | None = None,  # [B, N, L]
    sigmoid: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention-to-mask: class tokens attend to feature tokens, and their similarity is the mask.

    Per head h: S_h = scale·Q_h·K_hᵀ and out_h = dropout(softmax(S_h))·V_h. Over heads: mask = mask_carry + mean_h S_h,
    before the softmax. (SegViT, arXiv 2210.05844, section 3.2.)

    Args:
        q: queries [B, N, C], one per class token; float64, float32, bfloat16 or float16; any strides.
        k, v: keys and values [B, L, C] of the same dtype and device.
        num_heads: H; must divide C.
        scale: factor of the similarity, (C/H)^-½ by default.
        dropout_p: dropout of the attention weights, in [0, 1); the mask is not dropped.
        mask_carry: [B, N, L] float32 (float64 beside float64 inputs), added to the mask logits: earlier stages' masks.
        sigmoid: return sigmoid(mask logits) in place of the logits.
        backend: "library" (scaled_dot_product_attention and one GEMM), "triton", "reference", or None for the best that
            can run: the library until the kernel has been measured on a GPU.

    Returns:
        out [B, N, C] in q's dtype, and the mask logits (or masks) [B, N, L] in float32 (float64 for float64 inputs).
        Gradients reach q, k, v and mask_carry through both outputs. Under autocast q, k and v are cast to its dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, no token at all, dropout outside [0, 1).
        RuntimeError: a backend that was asked for and cannot run, with the reason.
    """
    scale = _check(q, k, v, num_heads, scale, dropout_p, mask_carry)
    dtype = autocast_dtype(q.device)
    if dtype is not None and q.dtype != torch.float64:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    candidates = [("library", None), ("reference", None), ("triton", lambda: _triton_reason(q, num_heads))]
    # A tensor on the meta device has nothing to compute: one operator call is what a FLOP counter should see.
    name = "reference" if q.is_meta else choose("atm", backend, candidates)
    with without_autocast(q.device):
        if name == "library":
            return _library(q, k, v, num_heads, scale, dropout_p, mask_carry, sigmoid)
        seed = torch.randint(2**62, (1,), device=q.device) if dropout_p > 0 else None
        if is_plain():
            return reference_atm(q, k, v, num_heads, scale, dropout_p, mask_carry, sigmoid, seed)
        out, mask, _ = torch.ops.segvit.atm(q, k, v, num_heads, scale, dropout_p, seed, mask_carry, sigmoid, name)
        return out, mask


def _triton_reason(q: Tensor, num_heads: int) -> str | None:
    reason = triton_missing(q.device)
    if reason is None:
        from segvit.kernels.atm import unsupported

        reason = unsupported(q, num_heads)
    return reason


def _check(q, k, v, num_heads, scale, dropout_p, mask_carry) -> float:
    """Refuse what does not fit; return the scale."""
    for name, t, layout in (("q", q, "[B, N, C]"), ("k", k, "[B, L, C]"), ("v", v, "[B, L, C]")):
        _checks.tensor("atm", name, t, layout)
        if t.dtype != q.dtype:
            raise ValueError(f"atm: {name} has dtype {t.dtype}, but q has {q.dtype}")
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"atm: q must be [B, N, C] and k, v [B, L, C], got {shapes}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"atm: no dimension may be zero, got q {tuple(q.shape)} and k {tuple(k.shape)}")
    if not isinstance(num_heads, int) or num_heads < 1 or q.shape[2] % num_heads:
        raise ValueError(f"atm: num_heads must divide the width C = {q.shape[2]}, got {num_heads}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"atm: dropout_p must be in [0, 1), got {dropout_p}")
    if mask_carry is not None:
        wanted = torch.float64 if q.dtype == torch.float64 else torch.float32
        _checks.tensor("atm", "mask_carry", mask_carry, "[B, N, L]", (wanted,))
        if mask_carry.shape != (q.shape[0], q.shape[1], k.shape[1]):
            expected = (q.shape[0], q.shape[1], k.shape[1])
            raise ValueError(f"atm: mask_carry must be [B, N, L] = {expected}, got {tuple(mask_carry.shape)}")
    _checks.same_device("atm", q=q, k=k, v=v, mask_carry=mask_carry)
    return (q.shape[2] // num_heads) ** -0.5 if scale is None else float(scale)


def _library(q, k, v, num_heads, scale, dropout_p, mask_carry, sigmoid) -> tuple[Tensor, Tensor]:
    """The best composition of library calls: fused attention, and the mask as one GEMM (Σ_h Q_h·K_hᵀ = Q·Kᵀ)."""
    qh, kh, vh = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(qh, kh, vh, dropout_p=dropout_p, scale=scale).transpose(1, 2).flatten(2)
    # alpha is applied before the result is rounded, so that half precision holds the logits and not their H/scale-fold
    exact = mask_carry is not None and q.dtype in (torch.float32, torch.float64)
    addend = mask_carry if exact else q.new_zeros(1, 1, 1)
    mask = torch.baddbmm(addend, q, k.mT, beta=float(exact), alpha=scale / num_heads)
    mask = mask if mask.dtype == torch.float64 else mask.float()
    mask = mask if exact or mask_carry is None else mask + mask_carry
    return out, mask.sigmoid() if sigmoid else mask


def _statistics_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _forward(q, k, v, num_heads, scale, dropout_p, seed, mask_carry, sigmoid, backend):
    if backend == "triton":
        from segvit.kernels.atm import forward

        return forward(q, k, v, num_heads, scale, dropout_p, seed, mask_carry, sigmoid)
    out, mask = reference_atm(q, k, v, num_heads, scale, dropout_p, mask_carry, sigmoid, seed)
    return out, mask, q.new_zeros((q.shape[0], num_heads, q.shape[1]), dtype=_statistics_dtype(q))


def _forward_fake(q, k, v, num_heads, scale, dropout_p, seed, mask_carry, sigmoid, backend):
    B, N, _ = q.shape
    dtype = _statistics_dtype(q)
    mask = q.new_empty((B, N, k.shape[1]), dtype=dtype)
    return q.new_empty(q.shape), mask, q.new_empty((B, num_heads, N), dtype=dtype)


def _backward(grad_out, grad_mask, q, k, v, out, lse, num_heads, scale, dropout_p, seed, backend):
    if backend == "triton":
        from segvit.kernels.atm import backward

        return backward(grad_out, grad_mask, q, k, v, out, lse, num_heads, scale, dropout_p, seed)
    return reference_backward(grad_out, grad_mask, q, k, v, num_heads, scale, dropout_p, seed)


def _backward_fake(grad_out, grad_mask, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _Autograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, num_heads, scale, dropout_p, seed, mask_carry, sigmoid, backend):
        arguments = (q, k, v, num_heads, scale, dropout_p, seed, mask_carry, sigmoid, backend)
        out, mask, lse = below_autograd(torch.ops.segvit.atm, *arguments)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, out, lse, seed, mask if sigmoid else None)
        ctx.arguments = num_heads, scale, dropout_p
        ctx.backend = backend
        return out, mask, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_mask, grad_lse):
        *saved, seed, mask = ctx.saved_tensors
        with without_autocast(grad_out.device):
            if mask is not None:
                grad_mask = torch.ops.aten.sigmoid_backward(grad_mask, mask)
            grads = torch.ops.segvit.atm_backward(grad_out, grad_mask, *saved, *ctx.arguments, seed, ctx.backend)
        return *grads, None, None, None, None, grad_mask if ctx.needs_input_grad[7] else None, None, None


register(
    "atm_backward(Tensor grad_out, Tensor grad_mask, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "int num_heads, float scale, float dropout_p, Tensor? seed, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
register(
    "atm(Tensor q, Tensor k, Tensor v, int num_heads, float scale, float dropout_p, Tensor? seed, "
    "Tensor? mask_carry, bool sigmoid, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _Autograd,
)
