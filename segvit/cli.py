"""The `segvit` command. A wrong argument or file ends in one line and exit code 2 or 1, never in a traceback."""

import json
import os
import sys
from pathlib import Path

import jsonargparse

import segvit

EXAMPLES = {
    "demo": "segvit demo --out demo",
    "train": "segvit train DATA --backbone vit_tiny_patch16_224 --pretrained WEIGHTS.safetensors --steps 600",
    "evaluate": "segvit evaluate runs/segvit/best DATA/val --json",
    "predict": "segvit predict runs/segvit/best photo.jpg folder/ --out predictions",
    "models": "segvit models --json",
    "env": "segvit env",
}


class Parser(jsonargparse.ArgumentParser):
    """A wrong argument is one line, not a page of usage."""

    def error(self, message: str, ex: Exception | None = None):
        line = " ".join(str(message).split())
        raise SystemExit(_fail(f"{self.prog}: {line} (see --help)", 2))


def _fail(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


def _parser() -> Parser:
    parser = Parser(prog="segvit", description="Semantic segmentation with plain Vision Transformers.")
    parser.add_argument("--version", action="version", version=f"segvit {segvit.__version__}")
    commands = parser.add_subcommands(dest="command", required=True)
    for name, (describe, arguments, _) in COMMANDS.items():
        command = Parser(description=describe, epilog=f"example: {EXAMPLES[name]}")
        arguments(command)
        commands.add_subcommand(name, command, help=describe)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for data or files that do not fit, 2 for wrong arguments."""
    try:
        arguments = _parser().parse_args(argv)
        COMMANDS[arguments.command][2](arguments[arguments.command])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else _fail(str(stop.code), 1) if stop.code else 0
    except (ValueError, RuntimeError, OSError, FloatingPointError, AssertionError) as error:
        if os.environ.get("SEGVIT_TRACEBACK") == "1":
            raise
        return _fail(f"segvit: error: {' '.join(str(error).split())}", 1)
    except KeyboardInterrupt:
        return _fail("segvit: stopped", 130)
    return 0


def _demo_arguments(parser: Parser) -> None:
    parser.add_argument("--out", type=str, default="demo", help="folder for the picture and the model")
    parser.add_argument("--steps", type=int, default=220, help="training steps of 16 images")
    parser.add_argument("--seed", type=int, default=0, help="of the data, the weights and their order")


def _demo(arguments) -> None:
    from segvit.demo import run_demo

    scores, picture = run_demo(arguments.out, arguments.steps, arguments.seed)
    print(f"mIoU {scores.miou:.2f}")
    print(picture)


def _train_arguments(parser: Parser) -> None:
    parser.add_argument("--config", action="config", help="YAML file of these arguments; the command line overrides it")
    parser.add_argument("data", type=str, help="folder with train/images, train/labels, val/… and classes.txt")
    parser.add_argument("--classes", type=str | None, default=None, help="class names, one a line; DATA/classes.txt")
    parser.add_argument("--out", type=str, default="runs/segvit", help="folder for checkpoints and the log")
    parser.add_argument("--backbone", type=str, default="vit_base_patch16_384.augreg_in21k_ft_in1k", help="a timm ViT")
    parser.add_argument(
        "--pretrained", type=bool | str, default=True, help="true (from the Hub), false, or a weights file"
    )
    parser.add_argument("--shrink", type=str | None, default=None, help="v1: about 40 percent fewer multiply-adds")
    parser.add_argument("--crop", type=int | list[int], default=512, help="training crop, one side or [height, width]")
    parser.add_argument("--scale", type=list[float], default=[0.5, 2.0], help="random resizing from, to")
    parser.add_argument("--steps", type=int, default=20000, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=8, help="images a step and process")
    parser.add_argument("--lr", type=float, default=1e-4, help="of the backbone")
    parser.add_argument("--decoder_lr", type=float, default=10.0, help="factor of lr for the decoder")
    parser.add_argument("--weight_decay", type=float, default=0.01, help="not for the backbone's norms")
    parser.add_argument("--warmup", type=int | None, default=None, help="steps; a twentieth by default")
    parser.add_argument("--drop_path", type=float, default=0.1, help="stochastic depth of the backbone")
    parser.add_argument("--freeze_backbone", type=bool, default=False, help="train the decoder alone")
    parser.add_argument("--activation_checkpointing", type=bool, default=False, help="less memory, more time")
    parser.add_argument("--ignore_index", type=int, default=255, help="label of pixels without a truth")
    parser.add_argument("--ignored", type=str, default="masked", help="masked, or negative as the official code has it")
    parser.add_argument("--precision", type=str | bool, default="no", help="no (float32), bf16 or fp16")
    parser.add_argument("--validate_every", type=int | None, default=None, help="steps; at the end by default")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and augmentation")


def _train(arguments) -> None:
    from segvit.training import train_folder

    options = arguments.as_dict()
    options.pop("config", None)
    result = train_folder(**options)
    if result["main_process"]:
        print(f"mIoU {result['miou']:.4f}")
        print(result["checkpoint"])


def _data_arguments(parser: Parser) -> None:
    parser.add_argument("--mode", type=str, default="whole", help="whole or slide")
    parser.add_argument(
        "--crop", type=int | list[int] | None, default=None, help="window of --mode slide; the model's size"
    )
    parser.add_argument(
        "--stride", type=int | list[int] | None, default=None, help="of windows; two thirds of the crop"
    )
    parser.add_argument("--scales", type=list[float], default=[1.0], help="image scales to average over")
    parser.add_argument("--flip", type=bool, default=False, help="also average over mirrored images")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1 …")


def _prediction_options(arguments) -> dict:
    if arguments.mode == "whole" and (arguments.crop or arguments.stride):
        raise ValueError("--crop and --stride go with --mode slide")
    names = {"mode": "mode", "crop": "crop_size", "stride": "stride", "scales": "scales", "flip": "flip"}
    return {ours: arguments[name] for name, ours in names.items()}


def _load(checkpoint: str, device: str):
    """A saved model on the device asked for."""
    import torch

    from segvit.models import SegViT

    near = Path(checkpoint).exists() or Path(checkpoint).parent.is_dir() or checkpoint.count("/") != 1
    if not Path(checkpoint, "config.json").is_file() and near:
        raise FileNotFoundError(f"{checkpoint}: no checkpoint there (a folder with config.json and model.safetensors)")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = SegViT.from_pretrained(checkpoint)
    except Exception as error:  # a damaged file raises what its reader raises
        raise ValueError(f"{checkpoint}: cannot load this model: {error}") from error
    return model.to(device).eval()


def _evaluate_arguments(parser: Parser) -> None:
    parser.add_argument("checkpoint", type=str, help="folder of a saved model, or its name on the Hub")
    parser.add_argument("data", type=str, help="folder with images/ and labels/")
    parser.add_argument("--ignore_index", type=int, default=255, help="label of pixels without a truth")
    parser.add_argument("--json", action="store_true", help="print one JSON value and nothing else to stdout")
    _data_arguments(parser)


def _evaluate(arguments) -> None:
    from segvit.data import SegmentationFolder
    from segvit.training import evaluate

    model = _load(arguments.checkpoint, arguments.device)
    data = SegmentationFolder(arguments.data, model.class_names, arguments.ignore_index)
    scores = evaluate(model, data, arguments.ignore_index, **_prediction_options(arguments))
    if arguments.json:
        value = {"miou": scores.miou, "macc": scores.macc, "aacc": scores.aacc, "images": len(data)}
        value["iou"] = dict(zip(model.class_names, scores.iou))
        print(json.dumps(_without_nan(value), indent=2))
        return
    print(scores.table(model.class_names))
    print(f"mIoU {scores.miou:.4f}  mAcc {scores.macc:.4f}  aAcc {scores.aacc:.4f}  on {len(data)} images")


def _without_nan(value):
    """NaN is no JSON: null says that there is no number."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    return None if value != value else value


def _predict_arguments(parser: Parser) -> None:
    parser.add_argument("checkpoint", type=str, help="folder of a saved model, or its name on the Hub")
    parser.add_argument("images", type=str, nargs="+", help="image files, or folders of them")
    parser.add_argument("--out", type=str, default="predictions", help="folder for label PNGs and overlays")
    _data_arguments(parser)


def _predict(arguments) -> None:
    from tqdm import tqdm

    from segvit.data.images import EXTENSIONS, read_image
    from segvit.inference import predict
    from segvit.visualize import label_image, overlay

    paths = []
    for given in map(Path, arguments.images):
        if not given.exists():
            raise FileNotFoundError(f"{given}: no such file or folder")
        inside = sorted(p for p in given.iterdir() if p.suffix.lower() in EXTENSIONS) if given.is_dir() else [given]
        if not inside:
            raise ValueError(f"{given}: no images in this folder ({', '.join(EXTENSIONS)})")
        paths += inside
    out = Path(arguments.out)
    written: dict[Path, Path] = {}
    for path in paths:
        for target in (out / f"{path.stem}.png", out / f"{path.stem}_overlay.png"):
            if target in written:
                raise ValueError(
                    f"{path} and {written[target]}: their predictions would overwrite each other ({target})"
                )
            written[target] = path
    taken = {target.resolve() for target in written} & {path.resolve() for path in paths}
    if taken:
        raise ValueError(f"{min(taken)} is an image to predict, and would be overwritten; choose another --out")
    options = _prediction_options(arguments)
    model = _load(arguments.checkpoint, arguments.device)
    out.mkdir(parents=True, exist_ok=True)
    for path in tqdm(paths, desc="predicting", unit="image"):
        image = read_image(path, len(model.mean))
        labels = predict(model, image, **options)[0].cpu().numpy()
        label_image(labels, model.num_classes).save(out / f"{path.stem}.png")
        overlay(image, labels, model.class_names).save(out / f"{path.stem}_overlay.png")
    print(f"{len(paths)} label maps and overlays in {out}")


def _models_arguments(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON value and nothing else to stdout")


def _models(arguments) -> None:
    from tqdm import tqdm

    infos = segvit.list_models()
    rows = [info.to_dict() for info in tqdm(infos, desc="counting", unit="model", leave=False)]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    width = max(len(row["name"]) for row in rows)
    print(f"{'name':<{width}}  {'size':>9}  classes    GMAC  params M  paper  licence of the backbone's weights")
    for row in rows:
        size, paper = "x".join(map(str, row["image_size"])), "yes" if row["published"] else ""
        numbers = f"{row['num_classes']:>7}  {row['gmac']:>6.1f}  {row['params_m']:>8.1f}"
        print(f"{row['name']:<{width}}  {size:>9}  {numbers}  {paper:<5}  {row['licence']}")


def _env(arguments) -> None:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from segvit.ops._dispatch import NATIVE_MISSING

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines = {
        "segvit": segvit.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu threads": torch.get_num_threads(),
        "gpu": gpu,
        "segvit._C": NATIVE_MISSING or "loaded",
        "SEGVIT_KERNELS": os.environ.get("SEGVIT_KERNELS", "auto"),
    }
    lines |= {name: installed(name) for name in ("torch", "timm", "triton", "torchvision", "numpy", "accelerate")}
    for name, value in lines.items():
        print(f"{name:<15} {value}")


COMMANDS = {
    "demo": ("Train a small model on the embedded data set and write a picture.", _demo_arguments, _demo),
    "train": ("Train on a folder of images and label maps.", _train_arguments, _train),
    "evaluate": ("mIoU and per-class scores of a checkpoint on a folder.", _evaluate_arguments, _evaluate),
    "predict": ("Label maps and overlays of images.", _predict_arguments, _predict),
    "models": ("Models by name, with multiply-adds, parameters and licences.", _models_arguments, _models),
    "env": ("What a bug report needs: versions, devices, backends.", lambda parser: None, _env),
}
