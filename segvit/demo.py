"""`segvit demo`: train a small SegViT from nothing on the embedded data set, and show what it learnt."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from segvit.data import Shapes
from segvit.data.stream import default_workers
from segvit.evaluation import evaluate
from segvit.explanation import explain
from segvit.inference import predict
from segvit.losses import ATMLoss
from segvit.metrics import Scores
from segvit.models import SegViT
from segvit.training import fit
from segvit.visualize import comparison

SIZE, BATCH = 96, 16


class Normalised:
    """uint8 image → what the model takes; half of the samples mirrored."""

    def __init__(self, model: SegViT):
        self.mean, self.std = model.mean[:, None, None], model.std[:, None, None]

    def __call__(self, image: torch.Tensor, labels: torch.Tensor):
        if torch.rand(()) < 0.5:
            image, labels = image.flip(-1), labels.flip(-1)
        return (image.float() / 255 - self.mean) / self.std, labels


def small_model(classes: Sequence[str] = Shapes.classes, **options) -> SegViT:
    """0.9 M parameters, patch 8, 96×96 pixels: trains in a minute on two CPU cores. Options are SegViT's."""
    layout = {"out_indices": (1, 3, 5)} if "shrink" not in options else {"shrink_at": 2, "out_indices": (1, 5)}
    return SegViT(
        "vit_tiny_patch16_224",
        num_classes=len(classes),
        image_size=SIZE,
        decoder_layers=2,
        dropout=0.0,
        drop_path=0.0,
        class_names=classes,
        backbone_kwargs={"patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3},
        **layout,
        **options,
    )


def train_small(model: SegViT, steps: int, seed: int) -> list[dict]:
    """Train on shapes that never repeat; returns the records of fit."""
    loss = ATMLoss(model.num_classes, Shapes.ignore_index)
    data = Shapes(BATCH * steps, SIZE, seed=seed + 1, transform=Normalised(model))
    recipe = {"batch_size": BATCH, "lr": 1e-3, "decoder_lr": 1.0, "warmup": steps // 20, "clip": 5.0, "seed": seed}
    return fit(model, loss, data, steps=steps, **recipe, workers=default_workers())


def run_demo(out: str | Path = "demo", steps: int = 220, seed: int = 0) -> tuple[Scores, Path]:
    """Train, evaluate on 200 unseen images, write pictures and the model to `out`: demo.png, explain.png, model."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = small_model()
    train_small(model, steps, seed)
    unseen = Shapes(200, SIZE, seed=seed + 2)
    scores = evaluate(model, unseen)
    rows = []
    for i in range(4):
        image, labels = unseen[i]
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        rows.append((picture, labels.numpy(), predict(model, image)[0].numpy()))
    path = out / "demo.png"
    comparison(rows, model.class_names, side=2 * SIZE).save(path)
    explain(model, unseen[0][0]).picture(side=2 * SIZE).save(out / "explain.png")
    model.save_pretrained(out / "model")
    return scores, path
