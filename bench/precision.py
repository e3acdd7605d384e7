"""How far bf16, fp16 and int8 agree with float32 on real images, for every family of backbone; what they take and cost.

python bench/precision.py DATA WEIGHTS                       # CamVid, a pretrained ViT-Tiny; half an hour on one core
python bench/precision.py DATA --model RUN "DINOv3" "BEiT v2"   # AugReg from a run of `segvit train`; other families

For each family a SegViT in float32, the same cast to bf16 and to fp16, and, where torchao is installed, with the
weights of its Linear layers in int8, and with their inputs in int8, too ("dynamic"), in the backbone alone and
everywhere. Counted on all validation images: mIoU, and the share of pixels whose label is float32's, of all and of
labelled ones.

AugReg is a real pretrained ViT-Tiny. The others have random weights here: small models (six blocks, 192 wide), trained
for some minutes on images of 160x120 (LayerScale starts at 0.1, or their blocks would hardly take part). They lack the
outliers among the activations of large pretrained models: their rows say how the code behaves in a precision, not how
every checkpoint will. `largest` is the largest number that a module put out in float32 on eight images; fp16 ends at
65504.

A precision is good enough here if mIoU stays within 0.01 of float32's.
"""

import argparse
import copy
import io
import json
import re
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import harness
import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

import segvit
from segvit.checkpoints import load_model
from segvit.data.layouts import open_data
from segvit.data.transforms import TrainTransform
from segvit.inference import normalise
from segvit.metrics import ConfusionMatrix
from segvit.precision import PRECISIONS, in_precision, quantise
from segvit.training import fit

PRETRAINED = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
SMALL = {"embed_dim": 192, "depth": 6, "num_heads": 3}
SCALED = SMALL | {"init_values": 0.1}
FAMILIES = {
    "AugReg": (PRETRAINED, None),
    "DeiT III": ("deit3_small_patch16_224.fb_in22k_ft_in1k", SCALED),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2.lvd142m", SCALED),
    "DINOv3": ("vit_small_patch16_dinov3.lvd1689m", SCALED),
    "EVA02": ("eva02_tiny_patch14_224.mim_in22k", SMALL),
    "SigLIP": ("vit_base_patch16_siglip_224.webli", SMALL),
    "CLIP": ("vit_base_patch16_clip_224.openai", SMALL),
    "BEiT v2": ("beitv2_base_patch16_224.in1k_ft_in22k_in1k", SCALED),
}
CROP, SHORT_SIDE = (96, 128), 120  # of the small models
PRETRAINED_CROP = (192, 256)
BOUND = 0.01  # of mIoU: what a precision may lose
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_int8")


def trained(family: str, data: str, weights: str | None, steps: int, keep: Path | None) -> nn.Module:
    """A SegViT of a family, trained on the train part; or as it was kept by an earlier call."""
    folder = keep and keep / re.sub(r"\W+", "_", f"{family.lower()} {steps}")
    if folder and (folder / "config.json").is_file():
        return load_model(folder)
    torch.manual_seed(0)
    train = open_data(data, "train")
    name, kwargs = FAMILIES[family]
    crop, size = (PRETRAINED_CROP, None) if kwargs is None else (CROP, SHORT_SIDE)
    if kwargs is None and weights is None:
        raise SystemExit(f"{family} needs WEIGHTS, or a model: --model RUN")
    options = {"pretrained": weights} if kwargs is None else {"backbone_kwargs": kwargs}
    model = segvit.SegViT(name, len(train.classes), crop, class_names=train.classes, **options)
    train.transform = TrainTransform(crop, model.mean.tolist(), model.std.tolist(), short_side=size)
    rates = {"lr": 1e-4} if kwargs is None else {"lr": 1e-3, "decoder_lr": 1.0}
    loss = segvit.ATMLoss(len(train.classes))
    fit(model, loss, train, steps=steps, batch_size=8, warmup=steps // 10, **rates, description=family)
    if folder:
        model.save_pretrained(folder)
    return model


def precisions() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """What makes a float32 model one of each precision, by name."""
    made = {
        "float32" if name == "no" else name: lambda model, name=name: in_precision(model, name) for name in PRECISIONS
    }
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    except ImportError:
        print("torchao is not installed: no int8")
        return made

    def backbone(model: nn.Module, config) -> nn.Module:
        quantise(model.backbone, config)
        return model

    for kind, config in (("int8", Int8WeightOnlyConfig), ("int8 dynamic", Int8DynamicActivationInt8WeightConfig)):
        made[f"{kind}, backbone"] = lambda model, config=config: backbone(model, config())
        made[kind] = lambda model, config=config: quantise(model, config())
    return made


def compare(models: dict[str, nn.Module], data: Dataset, **options) -> dict[str, dict[str, float]]:
    """mIoU of every model, and the shares of its labels that are those of the first, on a data set."""
    first = next(iter(models))
    matrices = {name: ConfusionMatrix(model.num_classes, 255) for name, model in models.items()}
    equal, equal_labelled = dict.fromkeys(models, 0), dict.fromkeys(models, 0)
    pixels = labelled = 0
    for i in tqdm(range(len(data)), unit="image", desc="predicting", leave=False):
        image, truth = data[i]
        images = normalise(models[first], image[None])
        labels = {name: segvit.predict(model, images, **options)[0] for name, model in models.items()}
        counts = truth != 255
        pixels, labelled = pixels + truth.numel(), labelled + counts.sum().item()
        for name in models:
            same = labels[name] == labels[first]
            equal[name] += same.sum().item()
            equal_labelled[name] += (same & counts).sum().item()
            matrices[name].update(labels[name], truth)
    return {
        name: {
            "miou": matrices[name].compute().miou,
            "equal": equal[name] / pixels,
            "equal_labelled": equal_labelled[name] / labelled,
        }
        for name in models
    }


def constant_miou(data: Dataset) -> float:
    """Of the one label that does best everywhere: what a model must clearly exceed to have learnt anything."""
    matrix = ConfusionMatrix(len(data.classes), 255)
    for i in range(len(data)):
        truth = data[i][1]
        matrix.update(torch.zeros_like(truth), truth)
    pixels = torch.tensor(matrix.compute().pixels)
    return (pixels.max() / pixels.sum() / (pixels > 0).sum()).item()


@torch.no_grad()
def largest_output(model: nn.Module, data: Dataset, **options) -> tuple[float, str]:
    """The largest magnitude that a module puts out on eight images, and which."""
    found = (0.0, "")

    def watch(name: str):
        def hook(module, inputs, output):
            nonlocal found
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                found = max(found, (output.abs().max().item(), name))

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    for i in range(0, len(data), -(-len(data) // 8)):
        segvit.predict(model, normalise(model, data[i][0][None]), **options)
    for hook in hooks:
        hook.remove()
    return found


def cost(models: dict[str, nn.Module], data: Dataset, rounds: int = 7) -> dict[str, dict[str, float]]:
    """MiB of the weights, and milliseconds of CPU time, all threads together, to the labels of one whole image.

    All models in turn, so that a machine that slows down slows all of them.
    """
    images, times = normalise(next(iter(models.values())), data[0][0][None]), {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            start = time.process_time()
            segvit.predict(model, images)
            times[name].append((time.process_time() - start) * 1e3)
    return {
        name: {"weights_mib": saved_mib(model), "cpu_ms": statistics.median(times[name][1:])}  # the first warms up
        for name, model in models.items()
    }


def saved_mib(model: nn.Module) -> float:
    """Of the weights as torch.save writes them."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell() / 2**20


def cpu() -> str | None:
    """This CPU's name, and what of its instructions matters here (Linux)."""
    try:
        lines = dict(
            re.split(r"\s*:\s*", line, maxsplit=1)
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if ":" in line
        )
    except OSError:
        return None
    flags = [flag for flag in CPU_FLAGS if flag in lines.get("flags", "").split()]
    return f"{lines.get('model name')} ({', '.join(flags)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("weights_and_families", nargs="*", metavar="WEIGHTS FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--model", help="a trained model for AugReg's row")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--keep", type=Path, help="folder of the trained models, which another call takes from there")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON file")
    arguments = parser.parse_intermixed_args()
    given = arguments.weights_and_families
    weights = given.pop(0) if given and given[0] not in FAMILIES else None
    if unknown := [name for name in given if name not in FAMILIES]:
        parser.error(f"no family {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    try:
        torchao = version("torchao")
    except PackageNotFoundError:
        torchao = None
    val = open_data(arguments.data, "val")
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "precision.json"
    source = " --model RUN" if arguments.model else " VIT_TINY.safetensors"
    content = {
        "command": f"python bench/precision.py CAMVID{source}",
        "cpu": cpu(),
        "torchao": torchao,
        "timm": version("timm"),
        "images": len(val),
        "constant_miou": constant_miou(val),
        "bound": BOUND,
        "steps": arguments.steps,
        "rows": {},
    }
    if given and file.is_file():  # what was not asked for stays
        content["rows"] = json.loads(file.read_text())["rows"]
    for family in given or FAMILIES:
        small = FAMILIES[family][1] is not None
        if arguments.model and not small:
            model = load_model(arguments.model)
        else:
            model = trained(family, arguments.data, weights, arguments.steps, arguments.keep)
        model.eval().requires_grad_(False)
        models = {name: make(copy.deepcopy(model)) for name, make in precisions().items()}
        options = {"short_side": SHORT_SIDE if small else None}
        options["mode"] = "slide" if model.backbone.fixed_size else "whole"
        largest, where = largest_output(model, val, **options)
        row = {"backbone": FAMILIES[family][0], "weights": "random, small" if small else "pretrained"}
        row |= {"largest": largest, "largest_of": where, "precisions": compare(models, val, **options)}
        for name, values in {} if small else cost(models, val).items():
            row["precisions"][name] |= values
        for values in row["precisions"].values():
            values["within_bound"] = abs(values["miou"] - row["precisions"]["float32"]["miou"]) <= BOUND
        content["rows"][family] = row | {"machine": harness.machine()}
        file.write_text(json.dumps(content, indent=1) + "\n")
        shown = [{"precision": name, **values} for name, values in row["precisions"].items()]
        print(f"{family}: largest {largest:.3g} ({where})\n{harness.table(shown, list(shown[0]))}", flush=True)


if __name__ == "__main__":
    main()
