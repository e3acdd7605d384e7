import torch
from torch import Tensor

from segvit.ops.reference._sampling import resize


def label_dtype(num_classes: int) -> torch.dtype:
    """The smallest dtype of a label map: uint8 up to 256 classes, else int16."""
    return torch.uint8 if num_classes <= 256 else torch.int16


def no_class(best: Tensor, labels: Tensor) -> Tensor:
    """-1 where the best score is no number, else the label."""
    return torch.where(best.isnan(), -1, labels)


def mask_decode(
    mask_logits: Tensor,  # [B, N, h, w]
    class_probs: Tensor,  # [B, N, K], softmax without the no-object column
    size: tuple[int, int],
    output: str = "labels",
    dtype: torch.dtype | None = None,
    confidence: bool = False,
    prune: float = 0.0,
    extent: tuple[float, float] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # labels [B, H, W] (and confidence [B, H, W]) or scores [B, K, H, W]
    """score[c] = Σ_n class_probs[n, c]·sigmoid(bilinear(mask_logits[n])); label: argmax, confidence: maximum."""
    if prune > 0:
        class_probs = class_probs * ~(class_probs.amax(-1, keepdim=True) < prune)  # NaN stays, and shows
    scores = torch.einsum("bnhw,bnk->bkhw", resize(mask_logits, size, extent).sigmoid(), class_probs)
    if output == "scores":
        return scores
    best, labels = scores.max(1)
    labels = no_class(best, labels).to(dtype or label_dtype(class_probs.shape[-1]))
    return (labels, best) if confidence else labels
