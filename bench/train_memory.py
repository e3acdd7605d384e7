"""How much GPU memory a training step of the recipes for one GPU needs, counted on tensors without data.

python bench/train_memory.py [RECIPE …]    # needs no GPU; some minutes

Counted are weights, their gradients, AdamW's state, the average of the weights, activations and what operators allocate
on the way. Not counted: the CUDA context (about half a GiB), workspaces of cuBLAS and cuDNN, fragmentation; so a recipe
should stay below four fifths of its card. Attention is counted as PyTorch's own fused one has it.
"""

import argparse
import json
import time
from pathlib import Path

import harness
import torch
import yaml
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import segvit
from segvit.commands import RECIPES

CLASSES = 150
CARDS = {"gpu_8gb": 8, "gpu_12gb": 12, "gpu_24gb": 24, "gpu_80gb": 80}  # GiB


def build(recipe: dict) -> segvit.SegViT:
    names = ("backbone", "shrink", "drop_path", "activation_checkpointing", "freeze_backbone")
    given = {name: recipe[name] for name in names if name in recipe}
    with torch.device("meta"):
        return segvit.SegViT(num_classes=CLASSES, image_size=recipe["crop"], **given)


def without_data(module: nn.Module) -> None:
    """Parameters and buffers that have a shape, and nothing in it."""
    for own in (held for part in module.modules() for held in (part._parameters, part._buffers)):
        for name, value in own.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype)
                own[name] = nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty


def peak_bytes(recipe: dict) -> tuple[int, int]:
    """Largest sum of what is allocated at once in a step, and the number of parameters."""
    model, loss = build(recipe), segvit.ATMLoss(CLASSES)
    size, batch = recipe["crop"], recipe["batch_size"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        without_data(model)
        images, labels = torch.randn(batch, 3, size, size), torch.zeros(batch, size, size, dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(model, images, labels)
        with tracker:
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe["precision"] == "bf16"):
                out = model(images)
            loss(out, labels).total.backward()
    snapshot = tracker.get_tracker_snapshot("peak")
    step = sum(max(kinds.values()) for kinds in snapshot.values())  # the largest entry of a device is their sum
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    parts = 4 if recipe.get("total_batch", 0) > recipe["batch_size"] else 0  # gradients of the parts before, at most
    return step + (8 + parts) * trained + (4 * everything if recipe.get("ema") else 0), everything


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=list(CARDS))
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON file")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.recipes:
        recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
        start = time.perf_counter()
        peak, parameters = peak_bytes(recipe)
        row = {"recipe": name, "backbone": recipe["backbone"], "crop": recipe["crop"], "batch": recipe["batch_size"]}
        row |= {"parameters_m": round(parameters / 1e6, 1), "peak_gib": round(peak / 2**30, 2), "card_gib": CARDS[name]}
        rows.append(row)
        print(f"{name}: {row['peak_gib']} GiB ({time.perf_counter() - start:.0f} s)", flush=True)
    content = {"command": "python bench/train_memory.py", "machine": harness.machine(), "rows": rows}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "train_memory.json").write_text(json.dumps(content, indent=1) + "\n")
    print(harness.table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
