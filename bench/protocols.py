"""What the fused labels change against the paper's protocol, on real images: share of pixels, and mIoU.

python bench/protocols.py CHECKPOINT DATA    # a run of `segvit train` and its data

"fused" decodes labels straight at the image's own size; "paper" decodes scores at the size the model saw, resizes them
and takes the argmax. At scale 1 both are the same, so images are resized first. Also at scale 1: what pruning at 0.01
changes, and how many class tokens it drops.
"""

import argparse
import json
from pathlib import Path

import harness
import torch
from tqdm import tqdm

import segvit
from segvit.checkpoints import load_labels, load_model
from segvit.data.layouts import open_data
from segvit.metrics import BoundaryIoU, ConfusionMatrix

SCALES = (0.5, 0.75, 1.0, 1.5)
PRUNE = 0.01


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON file")
    arguments = parser.parse_args()
    model = load_model(arguments.checkpoint).to(harness.device()).eval()
    remembered = load_labels(arguments.checkpoint)
    options = {name: remembered[name] for name in ("layout", "label_map", "reduce_zero_label") if name in remembered}
    ignore = remembered.get("ignore_index", 255)
    data = open_data(arguments.data, "val", classes=model.class_names, ignore_index=ignore, **options)
    kinds = {(scale, protocol): {"protocol": protocol} for scale in SCALES for protocol in ("fused", "paper")}
    kinds[1.0, "pruned"] = {"prune": PRUNE}
    matrices = {kind: ConfusionMatrix(model.num_classes, ignore) for kind in kinds}
    edges = {kind: BoundaryIoU(model.num_classes, ignore) for kind in kinds}
    differing, pixels, kept = dict.fromkeys(kinds, 0), 0, 0.0
    for i in tqdm(range(len(data)), unit="image", desc="predicting"):
        image, truth = data[i]
        labels = {}
        for kind, how in kinds.items():
            short_side = None if kind[0] == 1 else round(kind[0] * min(image.shape[1:]))
            labels[kind] = segvit.predict(model, image[None], short_side=short_side, **how).cpu()[0]
            matrices[kind].update(labels[kind], truth)
            edges[kind].update(labels[kind], truth)
            differing[kind] += (labels[kind] != labels[kind[0], "fused"]).sum().item()
        pixels += truth.numel()
        probs = model((image[None].to(model.mean.device) / 255 - model.mean[:, None, None]) / model.std[:, None, None])
        probs = probs.class_logits[-1].softmax(-1)[..., :-1]
        kept += (probs.amax(-1) >= PRUNE).double().mean().item()
    rows = []
    for kind in kinds:
        scores, edge = matrices[kind].compute(), torch.tensor(edges[kind].compute()).nanmean().item()
        rows.append({"scale": kind[0], "protocol": kind[1], "differs_from_fused": differing[kind] / pixels})
        rows[-1] |= {"miou": scores.miou, "boundary_miou": edge}
    print(harness.table(rows, list(rows[0])))
    print(f"class tokens kept at {PRUNE}: {kept / len(data):.2f} of {model.num_classes} on average, as a share")
    content = {"command": "python bench/protocols.py CHECKPOINT DATA", "machine": harness.machine(), "rows": rows}
    content |= {"images": len(data), "prune": PRUNE, "share_of_tokens_kept": kept / len(data)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "protocols.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
