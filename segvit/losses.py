"""ATMLoss: classification of the class tokens, focal and dice loss of their masks. No matching: token n is class n."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.ops import mask_loss
from segvit.ops.reference._sampling import exact_dtype


class ATMLossOutput(NamedTuple):
    total: Tensor  # 0-d, what to call backward() on: the sum of all terms
    ce: Tensor  # [S], weighted, per stage
    focal: Tensor  # [S]
    dice: Tensor  # [S]
    edge: Tensor | None = None  # 0-d, weighted, where the model says which patches hold an edge


class ATMLoss(nn.Module):
    """The SegViT loss: Σ over stages of CE·1 + focal·20 + dice·1. (arXiv 2210.05844, section 3.3.)

    A model with edge-aware down-sampling gives edge logits, whose binary cross-entropy is added: the truth is whether a
    patch holds pixels of more than one class; the mean is over patches with at least one pixel that counts.

    CE: the token of a class that occurs in the image should say its class (weight 1, or class_weights), every other
    token "no object" (weight 0.1); weighted mean. Focal and dice: masks of the occurring classes, at label resolution.

    Args:
        num_classes: K.
        ignore_index: label of pixels without a truth.
        ignored: "masked" leaves ignored pixels out of the mask losses; "negative" counts them as background of every
            mask, as the official implementation does (for parity with its recipes).
        ce_weight, focal_weight, dice_weight, edge_weight: factors of the terms.
        no_object_weight: CE weight of tokens whose class does not occur.
        class_weights: K CE weights of tokens whose class occurs; None: 1 each.
        alpha, gamma: of the focal loss.
        learned: numbers of the classes that learn, as model.learned_classes; the tokens of others add nothing, and
            their pixels are background of the masks that learn. None: all.
        debug: raise ValueError where a label is neither a class nor ignore_index, which otherwise counts as ignored; on
            a GPU the host waits to know.

    Called with `out` (reads class_logits [S, B, N, K+1], mask_logits [S, B, N, h, w] and, when present, extent and
    edge_logits [B, h, w]) and labels [B, H, W] of any integer dtype. With several processes CE's sum of weights and the
    numbers of masks and patches are averaged over them in one all-reduce, so that DDP's mean is the loss of the joint
    batch. For gradient accumulation `divisors` has those of all parts (see the method of that name): then the sum of
    the parts' losses is the loss of the whole. A batch with nothing to learn gives every parameter a gradient all the
    same. Written to need no host sync (but for debug); not yet run on a GPU.

    Raises:
        ValueError: arguments that do not fit.
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        ignored: str = "masked",
        ce_weight: float = 1.0,
        focal_weight: float = 20.0,
        dice_weight: float = 1.0,
        no_object_weight: float = 0.1,
        class_weights: Sequence[float] | Tensor | None = None,
        alpha: float = 0.25,
        gamma: float = 2.0,
        debug: bool = False,
        edge_weight: float = 1.0,
        learned: Sequence[int] | None = None,
    ):
        super().__init__()
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes must be an integer of at least 1, got {num_classes!r}")
        if ignored not in ("masked", "negative"):
            raise ValueError(f'ignored must be "masked" or "negative", got {ignored!r}')
        weights = torch.ones(num_classes) if class_weights is None else torch.as_tensor(class_weights).float()
        if weights.shape != (num_classes,) or not (weights >= 0).all():
            raise ValueError(f"class_weights must be {num_classes} numbers of at least 0, got {class_weights!r}")
        for name, value in (("no_object_weight", no_object_weight), ("edge_weight", edge_weight)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value!r}")
        self.num_classes, self.ignore_index, self.ignored = num_classes, ignore_index, ignored
        self.ce_weight, self.focal_weight, self.dice_weight = ce_weight, focal_weight, dice_weight
        self.alpha, self.gamma, self.debug, self.edge_weight = alpha, gamma, debug, edge_weight
        self.register_buffer("weights", torch.cat([weights, torch.tensor([no_object_weight])]), persistent=False)
        learned = range(num_classes) if learned is None else list(learned)
        if not learned or not all(0 <= n < num_classes for n in learned):
            raise ValueError(f"learned must be class numbers from 0 to {num_classes - 1}, got {list(learned)}")
        chosen = torch.zeros(num_classes, dtype=torch.bool)
        chosen[list(learned)] = True
        self.register_buffer("learned", chosen, persistent=False)

    def forward(self, out, labels: Tensor, divisors: Tensor | None = None) -> ATMLossOutput:
        class_logits, mask_logits = out.class_logits, out.mask_logits
        edge_logits, extent = getattr(out, "edge_logits", None), getattr(out, "extent", None)
        self._check(class_logits, mask_logits, edge_logits, labels)
        present, target, weight = self._targets(labels)
        if divisors is None:
            patches = None if edge_logits is None else (edge_logits.shape[1:], extent)
            divisors = self.divisors(labels, patches)
        total_weight, num_masks, *num_patches = divisors
        class_logits = class_logits if class_logits.dtype == torch.float64 else class_logits.float()
        log_probs = class_logits.log_softmax(-1)
        nll = -log_probs.gather(-1, target.expand(len(class_logits), -1, -1)[..., None])[..., 0]  # [S, B, N]
        ce = self.ce_weight * (nll * weight).sum((1, 2)) / total_weight.clamp(min=1e-12)
        focal, dice = mask_loss(
            mask_logits,
            labels,
            present,
            num_masks,
            self.ignore_index,
            self.ignored,
            self.alpha,
            self.gamma,
            extent,
        )
        focal, dice = self.focal_weight * focal, self.dice_weight * dice
        total = (ce + focal + dice).sum()
        if edge_logits is None:
            return ATMLossOutput(total, ce, focal, dice)
        mixed, seen = mixed_patches(labels, self._counts(labels), edge_logits.shape[1:], extent)
        bce = F.binary_cross_entropy_with_logits(edge_logits, mixed.to(edge_logits.dtype), reduction="none")
        edge = self.edge_weight * (bce * seen).sum() / num_patches[0]
        return ATMLossOutput(total + edge, ce, focal, dice, edge)

    def divisors(self, labels: Tensor, patches: tuple | None = None) -> Tensor:  # [2], with patches [3]
        """What the terms are divided by: CE's sum of weights, the number of masks, and of patches that count.

        Averaged over processes. labels [B, H, W]; patches: (grid, extent) of the model's edge logits, if it has any.
        """
        present, _, weight = self._targets(labels)
        sums = [weight.sum(), present.sum()]
        if patches is not None:
            sums.append(mixed_patches(labels, self._counts(labels), *patches)[1].sum())
        return _average_over_processes(*sums)

    def _targets(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [B, N] each
        """Which classes occur, what every class token should say, and its CE weight."""
        learned = self.learned.to(labels.device)
        present = self._present(labels) & learned
        target = torch.where(present, torch.arange(self.num_classes, device=labels.device), self.num_classes)
        return present, target, self.weights.to(labels.device)[target] * learned

    def _check(self, class_logits: Tensor, mask_logits: Tensor, edge_logits: Tensor | None, labels: Tensor) -> None:
        if class_logits.dim() != 4 or class_logits.shape[2:] != (self.num_classes, self.num_classes + 1):
            expected = f"[S, B, {self.num_classes}, {self.num_classes + 1}]"
            raise ValueError(f"out.class_logits must be {expected}, got {tuple(class_logits.shape)}")
        if mask_logits.dim() != 5 or mask_logits.shape[:3] != class_logits.shape[:3]:
            expected = f"[S, B, N, h, w] with S, B, N = {tuple(class_logits.shape[:3])}"
            raise ValueError(f"out.mask_logits must be {expected}, got {tuple(mask_logits.shape)}")
        if edge_logits is not None and (edge_logits.dim() != 3 or len(edge_logits) != class_logits.shape[1]):
            raise ValueError(
                f"out.edge_logits must be [B, h, w] with B = {class_logits.shape[1]}, got {tuple(edge_logits.shape)}"
            )
        if labels.dim() != 3 or labels.is_floating_point() or labels.shape[0] != class_logits.shape[1]:
            got = f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(f"labels must be integers [B, H, W] with B = {class_logits.shape[1]}, got {got}")
        if labels.device != class_logits.device:
            raise ValueError(f"labels are on {labels.device}, but the model's output is on {class_logits.device}")
        if self.debug:
            labels = labels.long()
            strange = ~self._counts(labels) & (labels != self.ignore_index)
            if strange.any():
                found = labels[strange].unique().tolist()[:8]
                raise ValueError(
                    f"labels has {int(strange.sum())} pixels that are neither a class (0 to {self.num_classes - 1}) "
                    f"nor ignore_index ({self.ignore_index}): {', '.join(map(str, found))}"
                )

    def _counts(self, labels: Tensor) -> Tensor:  # bool, as labels
        """Which pixels have a class."""
        labels = labels.long()
        return (labels >= 0) & (labels < self.num_classes) & (labels != self.ignore_index)

    def _present(self, labels: Tensor) -> Tensor:  # [B, N] bool
        """Which classes occur in which image; a label that is no class counts as ignored."""
        index = labels.flatten(1).long()
        counts = self._counts(index)
        found = torch.zeros(len(index), self.num_classes + 1, dtype=torch.bool, device=labels.device)
        return found.scatter(1, torch.where(counts, index, self.num_classes), True)[:, :-1]


def mixed_patches(
    labels: Tensor,  # [B, H, W] of any integer dtype
    counts: Tensor,  # [B, H, W] bool: pixels that have a class
    grid: tuple[int, int],
    extent: tuple[float, float] | None = None,  # the part of the grid that the labels cover; None: all
) -> tuple[Tensor, Tensor]:  # [B, h, w] bool each
    """Which patches of a grid hold more than one class, and which hold any: the truth that an edge head learns.

    A pixel belongs to the patch that its centre lies in; patches need not be a whole number of pixels wide, and one
    without a centre takes its nearest pixels.
    """
    most = torch.iinfo(torch.int32).max
    index = labels.int()
    ends = torch.stack([torch.where(counts, index, most), torch.where(counts, -index, most)])  # lowest, −highest class
    for dim, cells, covered in ((2, grid[0], (extent or grid)[0]), (3, grid[1], (extent or grid)[1])):
        size = labels.shape[dim - 1]
        width = size / covered
        i = torch.arange(cells + 1, device=labels.device, dtype=exact_dtype(labels.device))
        first, nearest = (i * width - 0.5).ceil().long(), ((i + 0.5) * width).floor().long()
        empty = first[1:] <= first[:-1]
        last = torch.where(empty, nearest[:-1], first[1:] - 1)[:, None]
        first = torch.where(empty, nearest[:-1], first[:-1])[:, None]
        pixels = first + torch.arange(int(width) + 1, device=labels.device)
        pixels = pixels.minimum(last).clamp(0, size - 1)  # some stand there twice, which changes nothing
        ends = ends.index_select(dim, pixels.flatten()).unflatten(dim, pixels.shape).amin(dim + 1)
    lowest, highest = ends[0], -ends[1]
    return lowest < highest, lowest < most


def _average_over_processes(weight_sum: Tensor, *counts: Tensor) -> Tensor:
    """CE's sum of weights, and numbers of things, averaged in one all-reduce that the host does not wait for.

    A number is at least one over all processes, so that DDP's mean is the joint batch's loss.
    """
    sums, processes = torch.stack([weight_sum, *(count.to(weight_sum.dtype) for count in counts)]), 1
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        processes = dist.get_world_size()
        dist.all_reduce(sums)
    sums = sums / processes
    return torch.cat([sums[:1], sums[1:].clamp(min=1 / processes)])
