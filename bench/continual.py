"""Classes that come later: a model of the first ones gets the rest, from labels that show nothing else.

python bench/continual.py                    # the embedded data set, 4 classes and then 2; four minutes on one core
python bench/continual.py DATA WEIGHTS       # CamVid, 8 classes and then 3, a pretrained ViT-Tiny; forty minutes

first      trained on the first classes; pixels of the others have no label, in training and in this row
first_all  the same model judged on all labels: what it says where the other classes are is wrong, as it must be
added      first, then segvit.add_classes: what is new learns from images that show only new labels
tuned      first, then fine-tuned as a whole on the same images and with the same loss, which leaves old tokens alone
"""

import argparse
import json
import time
from pathlib import Path

import harness
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import segvit
from segvit.classes import with_classes
from segvit.data import Shapes
from segvit.data.layouts import open_data
from segvit.data.transforms import TrainTransform
from segvit.demo import BATCH, SIZE, Normalised, small_model
from segvit.evaluation import evaluate
from segvit.inference import normalise
from segvit.metrics import Scores
from segvit.training import fit

IGNORE = 255
CROP = (192, 256)
BACKBONE = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


class Labelled(Dataset):
    """A data set where only some classes have labels."""

    def __init__(self, data: Dataset, classes: range):
        self.data, self.classes = data, classes

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, labels = self.data[i]
        return image, torch.where((labels >= self.classes.start) & (labels < self.classes.stop), labels, IGNORE)


def shapes(steps: int, later: int) -> tuple:
    """First model, its training data and that of later classes, unseen images, names, and how to train."""
    model = small_model(Shapes.classes[:4])
    data = [Shapes(BATCH * n, SIZE, seed=seed, transform=Normalised(model)) for n, seed in ((steps, 1), (later, 2))]
    recipe = dict(batch_size=BATCH, lr=1e-3, decoder_lr=1.0)
    return model, *data, Shapes(200, SIZE, seed=3), list(Shapes.classes), recipe


def folder(data: str, weights: str) -> tuple:
    train, val = (open_data(data, part) for part in ("train", "val"))
    model = segvit.SegViT(BACKBONE, 8, image_size=CROP, pretrained=weights, class_names=train.classes[:8])
    train.transform = TrainTransform(CROP, model.mean.tolist(), model.std.tolist())
    return model, train, train, val, list(train.classes), dict(batch_size=8, lr=1e-4)


def rows(scores: Scores, names: list[str], first: int) -> dict:
    """IoU of every class, and means of the first, of the others and of all."""
    iou = torch.tensor(scores.iou, dtype=torch.float64)
    means = {"first": iou[:first], "later": iou[first:], "all": iou}
    return {
        "miou": {name: round(part.nanmean().item(), 4) for name, part in means.items() if len(part)},
        "iou": {name: round(value, 4) for name, value in zip(names, scores.iou)},
    }


@torch.no_grad()
def unchanged(old: nn.Module, new: nn.Module, data: Dataset) -> int:
    """On how many images mask and class logits of the old classes are the same, bit for bit."""
    K, same = old.num_classes, 0
    for i in range(len(data)):
        a, b = (model(normalise(model, data[i][0])[None]) for model in (old, new))
        logits = torch.cat([b.class_logits[:, :, :K, :K], b.class_logits[:, :, :K, -1:]], -1)
        same += torch.equal(a.class_logits, logits) and torch.equal(a.mask_logits, b.mask_logits[:, :, :K])
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?")
    parser.add_argument("weights", nargs="?")
    parser.add_argument("--steps", type=int, default=None, help="of the first training: 220, or 1500 with DATA")
    parser.add_argument("--later", type=int, default=None, help="of the later ones: 240, or 600 with DATA")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON file")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    steps = arguments.steps or (1500 if arguments.data else 220)
    later = arguments.later or (600 if arguments.data else 240)
    torch.manual_seed(arguments.seed)
    if arguments.data:
        model, early, late, val, names, recipe = folder(arguments.data, arguments.weights)
    else:
        model, early, late, val, names, recipe = shapes(steps, later)
    first, total, machine, seconds = model.num_classes, len(names), harness.machine(), {}

    def train(what: str, model: nn.Module, loss: nn.Module, data: Dataset, steps: int) -> nn.Module:
        start = time.perf_counter()
        fit(model, loss, data, steps=steps, warmup=steps // 20, seed=arguments.seed, description=what, **recipe)
        seconds[what] = round(time.perf_counter() - start)
        return model.eval()

    train("first", model, segvit.ATMLoss(first), Labelled(early, range(first)), steps)
    result = {"first": rows(evaluate(model, Labelled(val, range(first))), names, first)}
    blind = segvit.add_classes(model, names[first:]).eval()
    with torch.no_grad():
        blind.added[0].class_embed.bias[:-1] = -1e4  # what it does not know it never says
    result["first_all"] = rows(evaluate(blind, val), names, first)
    only = Labelled(late, range(first, total))
    added = segvit.add_classes(model, names[first:])
    loss = segvit.ATMLoss(total, ignored="negative", learned=added.learned_classes)
    train("added", added, loss, only, later)
    result["added"] = rows(evaluate(added, val), names, first)
    result["added"]["unchanged_images"] = f"{unchanged(model, added, val)} of {len(val)}"
    result["added"]["parameters"] = {
        "before": sum(p.numel() for p in model.parameters()),
        "added": sum(p.numel() for p in added.parameters() if p.requires_grad),
    }
    tuned, _ = with_classes(model, names)
    train("tuned", tuned, loss, only, later)
    result["tuned"] = rows(evaluate(tuned, val), names, first)
    command = "python bench/continual.py" + (" CAMVID VIT_TINY.safetensors" if arguments.data else "")
    for option in ("steps", "later", "seed"):
        given = getattr(arguments, option)
        command += "" if given == parser.get_default(option) else f" --{option} {given}"
    row = {"first_classes": first, "steps": {"first": steps, "later": later}, "seconds": seconds} | result
    name = "continual_camvid.json" if arguments.data else "continual_shapes.json"
    (arguments.out / name).write_text(json.dumps(row | {"command": command} | machine, indent=1) + "\n")
    for what in ("first", "first_all", "added", "tuned"):
        print(what, result[what]["miou"], flush=True)


if __name__ == "__main__":
    main()
