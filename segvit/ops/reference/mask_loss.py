import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.ops.reference._sampling import resize


def mask_loss(
    mask_logits: Tensor,  # [S, B, N, h, w]
    labels: Tensor,  # [B, H, W] integers
    present: Tensor,  # [B, N] bool, class n occurs in image b
    num_masks: Tensor,  # 0-d
    ignore_index: int = 255,
    ignored: str = "masked",
    alpha: float = 0.25,
    gamma: float = 2.0,
    extent: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:  # focal [S], dice [S]
    """Sigmoid focal loss and dice loss of the present classes' masks at label resolution, summed and over num_masks.

    focal = Σ_{b,n} mean_p α_t(1−p_t)^γ·BCE(x_p, t_p) / num_masks; dice = Σ_{b,n} 1 − (2Σσt+1)/(Σσ+Σt+1), / num_masks.
    "masked" leaves ignored pixels (ignore_index, or no class at all) out of every sum and mean; "negative" has them as
    t = 0, which is what the official implementation does.
    """
    N = mask_logits.shape[2]
    labels = labels.long()[:, None]  # [B, 1, H, W]
    x = resize(mask_logits, labels.shape[-2:], extent)
    t = (labels == torch.arange(N, device=x.device)[:, None, None]) & (labels != ignore_index)
    valid = (labels >= 0) & (labels < N) & (labels != ignore_index) | (ignored == "negative")
    t, valid, weight = t.to(x.dtype), valid.to(x.dtype), present.to(x.dtype)
    sigma = x.sigmoid() * valid
    p_t = x.sigmoid() * t + (1 - x.sigmoid()) * (1 - t)
    bce = F.binary_cross_entropy_with_logits(x, t.expand_as(x), reduction="none")
    alpha_t = alpha * t + (1 - alpha) * (1 - t)
    pixels = valid.sum((-2, -1)).clamp(min=1)  # [B, 1]
    focal = (alpha_t * (1 - p_t) ** gamma * bce * valid).sum((-2, -1)) / pixels
    overlap, total = (sigma * t).sum((-2, -1)), sigma.sum((-2, -1)) + t.sum((-2, -1))
    dice = 1 - (2 * overlap + 1) / (total + 1)
    return tuple((term * weight).sum((1, 2)) / num_masks for term in (focal, dice))
