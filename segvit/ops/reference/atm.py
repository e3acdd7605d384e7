import torch
from torch import Tensor


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash of two multiplications, in int64 arithmetic; the kernel computes the same in uint32."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def dropout_mask(
    seed: Tensor,  # [1] int64
    shape: tuple[int, int, int, int],  # B, H, N, L
    dropout_p: float,
    dtype: torch.dtype,
) -> Tensor:  # [B, H, N, L], 0 or 1 / (1 - dropout_p)
    """Counter-based dropout: element (b·H + h, n, l) and the seed decide, so that any tiling replays the mask."""
    B, H, N, L = shape
    key = _mix((seed & 0xFFFFFFFF) ^ _mix(torch.arange(B * H, device=seed.device) + ((seed >> 32) & 0xFFFFFFFF)))
    counter = torch.arange(N * L, device=seed.device) * 0x9E3779B9
    bits = _mix((counter + key[:, None]) & 0xFFFFFFFF).view(shape)
    return (bits >= int(dropout_p * 2**32)).to(dtype) / (1 - dropout_p)


def _heads(x: Tensor, num_heads: int) -> Tensor:  # [B, N, C] -> [B, H, N, d]
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def atm(
    q: Tensor,  # [B, N, C]
    k: Tensor,  # [B, L, C]
    v: Tensor,  # [B, L, C]
    num_heads: int,
    scale: float | None = None,
    dropout_p: float = 0.0,
    mask_carry: Tensor | None = None,  # [B, N, L]
    sigmoid: bool = False,
    seed: Tensor | None = None,  # [1] int64, needed when dropout_p > 0
) -> tuple[Tensor, Tensor]:  # out [B, N, C], mask logits [B, N, L]
    """Attention-to-mask: S = scale·QKᵀ per head, out = softmax(S)V, mask = carry + mean over heads of S."""
    scale = (q.shape[-1] // num_heads) ** -0.5 if scale is None else scale
    qh, kh, vh = (_heads(t, num_heads) for t in (q, k, v))
    similarity = scale * (qh @ kh.mT)
    weights = similarity.softmax(-1)
    if dropout_p > 0:
        weights = weights * dropout_mask(seed, weights.shape, dropout_p, weights.dtype)
    mask = similarity.mean(1)
    mask = mask if mask.dtype == torch.float64 else mask.float()
    mask = mask if mask_carry is None else mask + mask_carry
    return (weights @ vh).transpose(1, 2).flatten(2), mask.sigmoid() if sigmoid else mask


def atm_backward(
    grad_out: Tensor,  # [B, N, C]
    grad_mask: Tensor,  # [B, N, L], gradient of the mask LOGITS
    q: Tensor,  # [B, N, C]
    k: Tensor,  # [B, L, C]
    v: Tensor,  # [B, L, C]
    num_heads: int,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # dq [B, N, C], dk [B, L, C], dv [B, L, C]
    """Closed form: dS = P∘(dO·Vᵀ∘Z − rowsum(dO∘O)) + dM/H, then dQ = scale·dS·K, dK = scale·dSᵀ·Q, dV = (P∘Z)ᵀ·dO."""
    qh, kh, vh, gh = (_heads(t, num_heads) for t in (q, k, v, grad_out))
    p = (scale * (qh @ kh.mT)).softmax(-1)
    z = dropout_mask(seed, p.shape, dropout_p, p.dtype) if dropout_p > 0 else torch.ones_like(p)
    dp = (gh @ vh.mT) * z
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) + grad_mask.to(p.dtype)[:, None] / num_heads
    grads = scale * (ds @ kh), scale * (ds.mT @ qh), (p * z).mT @ gh
    return tuple(g.transpose(1, 2).flatten(2) for g in grads)
