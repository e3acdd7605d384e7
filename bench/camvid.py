"""What the parts of the model give on real data: four heads on one backbone, trained alike.

python bench/camvid.py DATA WEIGHTS [NAME …]    # CamVid, a pretrained ViT-Tiny; a quarter of an hour each on two cores

mask_3     ATM with classification and mask loss on three features (the model as it is)
mask_1     the same on the last feature alone
ce_1       ATM on the last feature, its similarities trained as the logits of a cross-entropy over pixels
linear_1   a linear classifier of the last feature's tokens, the same cross-entropy
"""

import argparse
import json
import time
from pathlib import Path

import harness
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import segvit
from segvit.data.layouts import open_data
from segvit.data.transforms import TrainTransform
from segvit.evaluation import evaluate
from segvit.losses import ATMLossOutput
from segvit.models.segvit import SegViTOutput
from segvit.training import fit

BACKBONE = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
CROP = (192, 256)


class PixelLogits(nn.Module):
    """A SegViT read as a classifier of pixels: mask n is the logit of class n, and class tokens say nothing more."""

    def __init__(self, model: segvit.SegViT, linear: bool):
        super().__init__()
        self.num_classes, self.image_size, self.class_names = model.num_classes, model.image_size, model.class_names
        self.mean, self.std = model.mean, model.std
        self.backbone = model.backbone
        if linear:
            self.head = nn.Linear(model.backbone.embed_dim, model.num_classes)
        else:
            self.head = model.decoder
            self.head.class_embed = nn.Identity()

    def parameter_groups(self, *rates: float) -> list[dict]:
        return segvit.SegViT.parameter_groups(self, *rates)

    def forward(self, images: Tensor) -> SegViTOutput:
        features = self.backbone(images)
        tokens, grid = features.tokens[-1], features.grids[-1]
        if isinstance(self.head, nn.Linear):
            logits = self.head(tokens).mT
        else:
            logits = self.head([tokens])[1][-1]
        logits = logits.unflatten(-1, grid).float()
        if not self.training:  # below zero a sigmoid tells large logits apart, and the largest stays the largest
            logits = logits - logits.amax(1, keepdim=True)
        K, patch = self.num_classes, self.backbone.patch_size
        certain = 100.0 * torch.eye(K, K + 1, device=images.device).expand(1, len(images), -1, -1)
        return SegViTOutput(certain, logits[None], (images.shape[2] / patch[0], images.shape[3] / patch[1]))


class PixelCE(nn.Module):
    """Cross-entropy of pixels, at the labels' size."""

    def forward(self, out: SegViTOutput, labels: Tensor) -> ATMLossOutput:
        logits = F.interpolate(out.mask_logits[-1], labels.shape[1:], mode="bilinear", align_corners=False)
        ce = F.cross_entropy(logits, labels, ignore_index=255)
        return ATMLossOutput(ce, ce[None], torch.zeros(1), torch.zeros(1))


def build(name: str, weights: str, classes: list[str]) -> tuple[nn.Module, nn.Module]:
    """A model and its loss."""
    last = None if name == "mask_3" else (11,)
    model = segvit.SegViT(
        BACKBONE, len(classes), image_size=CROP, out_indices=last, pretrained=weights, class_names=classes
    )
    if name.startswith("mask"):
        return model, segvit.ATMLoss(len(classes))
    return PixelLogits(model, linear=name.startswith("linear")), PixelCE()


def run(name: str, data: str, weights: str, steps: int, seed: int) -> dict:
    torch.manual_seed(seed)
    train, val = (open_data(data, part) for part in ("train", "val"))
    model, loss = build(name, weights, train.classes)
    train.transform = TrainTransform(CROP, model.mean.tolist(), model.std.tolist())
    start = time.perf_counter()
    recipe = {"batch_size": 8, "lr": 1e-4, "warmup": steps // 20, "seed": seed}
    records = fit(model, loss, train, steps=steps, **recipe, description=name)
    seconds = time.perf_counter() - start
    scores = evaluate(model, val)
    return {
        "miou": round(scores.miou, 4),
        "steps": steps,
        "seconds": round(seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "iou": {name: round(value, 4) for name, value in zip(train.classes, scores.iou)},
        "loss_last_50_steps": round(sum(r["loss"] for r in records[-5:]) / 5, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("weights")
    parser.add_argument("names", nargs="*", default=["mask_3", "mask_1", "ce_1", "linear_1"])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON files")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names:
        machine = harness.machine()
        row = run(name, arguments.data, arguments.weights, arguments.steps, arguments.seed)
        command = f"python bench/camvid.py CAMVID VIT_TINY.safetensors {name}"
        for option in ("steps", "seed"):
            given = getattr(arguments, option)
            command += "" if given == parser.get_default(option) else f" --{option} {given}"
        (arguments.out / f"camvid_{name}.json").write_text(
            json.dumps(row | {"command": command} | machine, indent=1) + "\n"
        )
        print(f"{name}: mIoU {row['miou']}", flush=True)


if __name__ == "__main__":
    main()
