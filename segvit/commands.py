"""What each command of the shell takes and does. What it needs is imported when it runs, as torch takes seconds."""

import json
import os
import sys
from pathlib import Path

from jsonargparse import ArgumentParser

import segvit
from segvit.picture_commands import curves_arguments, draw_curves, explain_arguments, explainer

RECIPES = Path(__file__).parent / "recipes"
EXAMPLES = {
    "demo": "segvit demo --out demo",
    "check-data": "segvit check-data DATA --picture check.png",
    "train": "segvit train DATA --backbone vit_tiny_patch16_224 --pretrained WEIGHTS.safetensors --steps 600",
    "evaluate": "segvit evaluate runs/segvit DATA --report report.html",
    "predict": "segvit predict runs/segvit photo.jpg folder/ --out predictions",
    "curves": "segvit curves runs/a runs/b --out curves.png",
    "export": "segvit export runs/segvit model.onnx --labels --verify",
    "models": "segvit models --json",
    "convert": "segvit convert segvit_vit_l_ade.pth converted --model segvit_large_ade20k_640",
    "env": "segvit env",
}


def recipe_names() -> str:
    """Of the recipes that come with segvit."""
    return ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))


def _demo_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=str, default="demo", help="folder for the picture and the model")
    parser.add_argument("--steps", type=int, default=220, help="training steps of 16 images")
    parser.add_argument("--seed", type=int, default=0, help="of the data, the weights and their order")


def _demo(arguments) -> None:
    from segvit.demo import run_demo

    scores, picture = run_demo(arguments.out, arguments.steps, arguments.seed)
    print(f"mIoU {scores.miou:.2f}")
    print(picture)


def _train_arguments(parser: ArgumentParser) -> None:
    from segvit.runs import train_folder

    describe = f"YAML file of these arguments, which the command line overrides; or {recipe_names()}"
    parser.add_argument("--config", action="config", help=describe)
    parser.add_function_arguments(train_folder, as_positional=True)


def _train(arguments) -> None:
    from segvit.runs import train_folder

    options = arguments.as_dict()
    for name in ("config", "typed"):
        options.pop(name, None)
    result = train_folder(**options)
    if result["main_process"]:
        print("mIoU unknown" if result["miou"] is None else f"mIoU {result['miou']:.4f}")
        print(result["checkpoint"])


def _label_arguments(parser: ArgumentParser, otherwise: str) -> None:
    """How labels are read; what is not given is as the model's training had it (or segvit's default)."""
    parser.add_argument("--layout", type=str | None, default=None, help=f"of the data, as in segvit train; {otherwise}")
    parser.add_argument("--classes", type=str | None, default=None, help="class names, one a line")
    parser.add_argument("--ignore_index", type=int | None, default=None, help="label of pixels without a truth")
    parser.add_argument(
        "--label_map", type=dict[int | str, int] | None, default=None, help="label in the files to class, {255: 1}"
    )
    parser.add_argument("--reduce_zero_label", type=bool | None, default=None, help="0 is ignored, k means class k-1")


def _label_options(arguments, remembered: dict) -> dict:
    """What was given, else what training used, else segvit's defaults."""
    defaults = {"layout": "folder", "ignore_index": 255, "label_map": None, "reduce_zero_label": False}
    chosen = {name: remembered.get(name, default) for name, default in defaults.items()}
    given = {name: arguments[name] for name in defaults if arguments[name] is not None}
    kept = {n: v for n, v in chosen.items() if n not in given and v != defaults[n] and n != "layout"}
    if kept:
        print(f"labels are read as in training: {', '.join(f'{n} {v}' for n, v in kept.items())}", file=sys.stderr)
    return chosen | given


def _check_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("data", type=str, help="folder or CSV file of segvit train, or one part of it")
    _label_arguments(parser, "folder by default")
    parser.add_argument("--channels", type=int, default=3, help="of the images, as in segvit train")
    parser.add_argument("--picture", type=str | None, default=None, help="write some images beside their labels here")
    parser.add_argument("--json", action="store_true", help="print one JSON value and nothing else to stdout")


def _check(arguments) -> None:
    from segvit.data.check import check_data, judge
    from segvit.data.images import read_image, to_picture
    from segvit.data.layouts import has_part, open_data
    from segvit.visualize import comparison

    options = _label_options(arguments, {}) | {"channels": arguments.channels}
    parts = [part for part in ("train", "val") if has_part(arguments.data, part, options["layout"])]
    if not parts:
        parts = [None if has_part(arguments.data, None, options["layout"]) else "train"]
    sets = {part: open_data(arguments.data, part, classes=arguments.classes, **options) for part in parts}
    files = {path.resolve() for data in sets.values() for pair in data.pairs for path in pair}
    if arguments.picture and Path(arguments.picture).resolve() in files:
        raise ValueError(
            f"{arguments.picture} is a file of this data set, and would be overwritten; choose another name"
        )
    reports = [check_data(data, part or "all") for part, data in sets.items()]
    judge(*reports)
    good = not any(report.problems for report in reports)
    if arguments.json:
        print(json.dumps({"ok": good, "parts": [report.to_dict() for report in reports]}, indent=2))
    else:
        print("\n\n".join(report.text() for report in reports))
    if arguments.picture and good:
        first = next(iter(sets.values()))
        chosen = range(0, len(first), max(len(first) // 6, 1))[:6]
        rows = [(to_picture(read_image(first.pairs[i][0], first.channels)), first.read_labels(i)[1]) for i in chosen]
        Path(arguments.picture).parent.mkdir(parents=True, exist_ok=True)
        comparison(rows, first.classes, side=360).save(arguments.picture)
        print(arguments.picture, file=sys.stderr if arguments.json else sys.stdout)
    if not good:
        raise ValueError("the data has problems that training would refuse (named above)")


def _prediction_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--mode", type=str, default="auto", help="whole, slide, or auto: slide where images are large")
    parser.add_argument("--crop", type=int | list[int] | None, default=None, help="window; the model's size")
    parser.add_argument("--stride", type=int | list[int] | None, default=None, help="of windows; 2/3 of the crop")
    parser.add_argument(
        "--short_side", type=int | None, default=None, help="resize images to this short side first; as in training"
    )
    parser.add_argument("--scales", type=list[float], default=[1.0], help="image scales to average over")
    parser.add_argument("--flip", type=bool, default=False, help="also average over mirrored images")
    parser.add_argument(
        "--protocol",
        type=str,
        default="fused",
        help="fused: labels straight at the image's size; paper: scores resized",
    )
    parser.add_argument("--prune", type=float, default=0.0, help="leave out class tokens less probable than this; 0.01")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1 …")
    parser.add_argument("--precision", type=str, default="no", help="no (float32), bf16, fp16, or int8 (weights alone)")


def _prediction_options(arguments, remembered: dict) -> dict:
    if arguments.mode == "whole" and (arguments.crop or arguments.stride):
        raise ValueError("--crop and --stride go with --mode slide or auto")
    names = ("mode", "stride", "scales", "flip", "protocol", "prune")
    short_side = remembered.get("short_side") if arguments.short_side is None else arguments.short_side
    return {name: arguments[name] for name in names} | {"crop_size": arguments.crop, "short_side": short_side}


def _load(checkpoint: str, device: str, precision: str = "no"):
    """A saved model on the device and in the precision asked for."""
    import torch

    from segvit.checkpoints import load_model
    from segvit.precision import in_precision

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("there is no GPU that PyTorch can use; --device cpu")
    return in_precision(load_model(checkpoint).to(device), precision).eval()


def _evaluate_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=str, help="folder of a run or of a saved model, or a name on the Hub")
    parser.add_argument("data", type=str, help="folder or CSV file: a whole data set, or one part of it")
    parser.add_argument("--part", type=str | None, default=None, help="of a whole data set; val by default")
    _label_arguments(parser, "what training had by default")
    parser.add_argument(
        "--boundary", type=float | None, default=None, help="also boundary IoU, within this share of the diagonal; 0.02"
    )
    parser.add_argument("--report", type=str | None, default=None, help="also write an HTML file with pictures here")
    parser.add_argument(
        "--skip_unreadable", type=bool, default=False, help="leave out what cannot be read, and say how many"
    )
    parser.add_argument(
        "--workers",
        type=int | None,
        default=None,
        help="processes that read images ahead; one without a GPU, else up to 8",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON value and nothing else to stdout")
    _prediction_arguments(parser)


def _evaluate(arguments) -> None:
    from segvit.checkpoints import load_labels
    from segvit.data.layouts import has_part, open_data
    from segvit.data.stream import default_workers
    from segvit.evaluation import evaluate, sample_name
    from segvit.report import Collector, check_target, write_report
    from segvit.resume import HELD_OUT

    model = _load(arguments.checkpoint, arguments.device, arguments.precision)
    remembered = load_labels(arguments.checkpoint)
    options = _label_options(arguments, remembered)
    part, place, held = arguments.part, arguments.data, Path(arguments.checkpoint, HELD_OUT)
    whole, val = (has_part(place, name, options["layout"]) for name in (None, "val"))
    names = _agreed_classes(model.class_names, arguments, options["layout"])
    if part is None and not val and held.is_file() and Path(place).is_dir():
        print(f"{place} has no val part: the images that training held out ({held})", file=sys.stderr)
        place, options["layout"] = str(held), "folder"
    elif part is None and (val or not whole):
        part = "val"
    data = open_data(place, part, classes=names, channels=len(model.mean), **options)
    if part is None and place == arguments.data:
        print(f"{arguments.data} has no parts: all {len(data)} images", file=sys.stderr)
    if arguments.boundary is not None and not 0 < arguments.boundary < 1:
        raise ValueError(f"--boundary must be a share of the image's diagonal, as 0.02, got {arguments.boundary}")
    prediction = _prediction_options(arguments, remembered)
    collector = None
    if arguments.report:
        check_target(Path(arguments.report))
        collector = Collector(len(names), options["ignore_index"], lambda i: sample_name(data, i))
    scores = evaluate(
        model,
        data,
        options["ignore_index"],
        boundary=arguments.boundary,
        workers=default_workers() if arguments.workers is None else arguments.workers,
        strict=not arguments.skip_unreadable,
        watch=collector,
        **prediction,
    )
    _print_scores(scores, names, len(data), arguments.precision, arguments.json)
    if collector is not None:
        shown = {"part": part, **options, "boundary": arguments.boundary, **prediction}
        shown["precision"] = arguments.precision
        meta = _provenance(arguments, {name: value for name, value in shown.items() if value is not None})
        title = f"{arguments.checkpoint} on {arguments.data}"
        write_report(arguments.report, scores, names, collector, title, meta)
        print(arguments.report, file=sys.stderr if arguments.json else sys.stdout)


def _print_scores(scores, names: list[str], total: int, precision: str, as_json: bool) -> None:
    """Scores on stdout, and on stderr how many of `total` images they leave out."""
    images = total - scores.left_out
    if scores.left_out:
        print(f"{scores.left_out} of {total} images are left out: they cannot be read", file=sys.stderr)
    if as_json:
        value = {"miou": scores.miou, "macc": scores.macc, "aacc": scores.aacc}
        value |= {"images": images, "left_out": scores.left_out, "precision": precision}
        value |= {"iou": dict(zip(names, scores.iou)), "absent": scores.absent(names)}
        if scores.boundary_iou is not None:
            value |= {"boundary_miou": scores.boundary_miou, "boundary_iou": dict(zip(names, scores.boundary_iou))}
        print(json.dumps(_without_nan(value), indent=2))
        return
    print(scores.table(names))
    edges = "" if scores.boundary_miou is None else f"  boundary mIoU {scores.boundary_miou:.4f}"
    print(f"mIoU {scores.miou:.4f}  mAcc {scores.macc:.4f}  aAcc {scores.aacc:.4f}{edges}  on {images} images")


def _provenance(arguments, options: dict) -> dict[str, str]:
    """What a report says of where its numbers come from."""
    from datetime import datetime

    import torch

    return {
        "checkpoint": arguments.checkpoint,
        "data": arguments.data,
        "options": ", ".join(f"{name} {value}" for name, value in options.items()),
        "command": arguments.typed,
        "date": datetime.now().astimezone().isoformat(" ", "seconds"),
        "PyTorch": torch.__version__,
    }


def _agreed_classes(trained: list[str], arguments, layout: str) -> list[str]:
    """The model's classes; an error where the data names others, whose numbers would mean something else."""
    from segvit.data.layouts import find_classes

    try:
        named = find_classes(arguments.data, layout, arguments.classes)
    except FileNotFoundError:
        if arguments.classes is not None:
            raise
        return trained  # the data names no classes: then its numbers mean the model's
    if named == trained or (len(named) == len(trained) and trained == [f"class {i}" for i in range(len(trained))]):
        return named
    if len(named) != len(trained):
        raise ValueError(f"the model has {len(trained)} classes, the data {len(named)}: it was trained on other data")
    i = next(i for i, (ours, theirs) in enumerate(zip(trained, named)) if ours != theirs)
    raise ValueError(
        f"class {i} is {trained[i]!r} to the model, but {named[i]!r} in the data; --classes names them anew"
    )


def _without_nan(value):
    """NaN is no JSON: null says that there is no number."""
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    return None if value != value else value


def _predict_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=str, help="folder of a run or of a saved model, or a name on the Hub")
    parser.add_argument("images", type=str, nargs="+", help="image files, or folders of them")
    parser.add_argument("--out", type=str, default="predictions", help="folder for label PNGs and overlays")
    explain_arguments(parser)
    _prediction_arguments(parser)


def _predict(arguments) -> None:
    from tqdm import tqdm

    from segvit.checkpoints import load_labels, make_folder
    from segvit.data.images import EXTENSIONS, read_image, to_picture
    from segvit.inference import plan_prediction, predict
    from segvit.visualize import label_image, overlay

    paths = []
    for given in map(Path, arguments.images):
        if not given.exists():
            raise FileNotFoundError(f"{given}: no such file or folder")
        inside = sorted(p for p in given.iterdir() if p.suffix.lower() in EXTENSIONS) if given.is_dir() else [given]
        if not inside:
            raise ValueError(f"{given}: no images in this folder ({', '.join(EXTENSIONS)})")
        paths += inside
    paths = list({path.resolve(): path for path in paths}.values())  # each file once
    out = Path(arguments.out)
    written: dict[Path, Path] = {}
    for path in paths:
        for ending in ("", "_overlay", *(["_explain"] if arguments.explain else [])):
            target = out / f"{path.stem}{ending}.png"
            if target in written:
                raise ValueError(
                    f"{path} and {written[target]}: their predictions would overwrite each other ({target})"
                )
            written[target] = path
    taken = {target.resolve() for target in written} & {path.resolve() for path in paths}
    if taken:
        raise ValueError(f"{min(taken)} is an image to predict, and would be overwritten; choose another --out")
    model = _load(arguments.checkpoint, arguments.device, arguments.precision)
    options = _prediction_options(arguments, load_labels(arguments.checkpoint))
    plan = plan_prediction(model, **options)
    explained = explainer(arguments, model, plan, len(paths))
    make_folder(out)
    unread = []
    for path in tqdm(paths, desc="predicting", unit="image"):
        try:
            image = read_image(path, len(model.mean))
        except ValueError as error:
            unread.append(str(error))
            continue
        labels = predict(model, image, **options)[0].cpu().numpy()
        explanation = explained(image, labels)
        label_image(labels, model.num_classes).save(out / f"{path.stem}.png")
        overlay(to_picture(image), labels, model.class_names).save(out / f"{path.stem}_overlay.png")
        if explanation is not None:
            explanation.save(out / f"{path.stem}_explain.png")
    if len(unread) < len(paths):
        kinds = "label maps, overlays and explanations" if arguments.explain else "label maps and overlays"
        print(f"{len(paths) - len(unread)} {kinds} in {out}")
    if unread:
        raise ValueError(f"{len(unread)} of {len(paths)} images left out: {'; '.join(unread)}")


def _export_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=str, help="folder of a run or of a saved model, or a name on the Hub")
    parser.add_argument("file", type=str, help="to write: .onnx, or .pt2 for a program of torch.export")
    parser.add_argument("--labels", type=bool, default=False, help="the file gives labels, not scores")
    parser.add_argument(
        "--normalise", type=bool, default=True, help="it takes uint8 pixels; false: floats, normalised already"
    )
    parser.add_argument(
        "--verify",
        type=str,
        nargs="*",
        default=None,
        help="run it on these images, or on generated ones, and compare with segvit.predict",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON value and nothing else to stdout")


def _export(arguments) -> None:
    from segvit.export import ENOUGH, export_onnx, export_program, verify

    writers = {".onnx": export_onnx, ".pt2": export_program}
    file = Path(arguments.file)
    if file.suffix not in writers:
        raise ValueError(f"{file}: name a file that ends in .onnx or .pt2")
    model = _load(arguments.checkpoint, "cpu")
    metadata = writers[file.suffix](model, file, arguments.labels, arguments.normalise)
    agreement = None if arguments.verify is None else verify(model, file, arguments.verify or None)
    if arguments.json:
        print(json.dumps({"file": str(file), **metadata, "verified": agreement and agreement._asdict()}, indent=2))
    else:
        print(f"{file}: {metadata['input']} -> {metadata['output']}")
    if agreement is None:
        return
    scores = "" if agreement.difference is None else f", scores within {agreement.difference:.1e}"
    same = f"{agreement.equal:.4%} of the labels of {agreement.images} images"
    line = f"{same} are those of segvit.predict for whole images{scores}"
    if agreement.equal < ENOUGH:
        raise ValueError(f"{file}: only {line}; below {ENOUGH:.1%} do not use it")
    print(line, file=sys.stderr if arguments.json else sys.stdout)


def _convert_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("file", type=str, help="official checkpoint, .pth or .safetensors")
    parser.add_argument("out", type=str, help="folder for our checkpoint")
    parser.add_argument("--model", type=str | None, default=None, help="which of the paper's models of `segvit models`")
    parser.add_argument("--config", type=str | None, default=None, help="or a JSON file with the official model dict")
    parser.add_argument("--classes", type=str | None, default=None, help="class names, one a line; the data set's own")


def _convert(arguments) -> None:
    from segvit.convert import convert_checkpoint

    model = convert_checkpoint(arguments.file, arguments.out, arguments.model, arguments.config, arguments.classes)
    print(f"{arguments.out}: {model.num_classes} classes, {model.image_size[0]}x{model.image_size[1]} pixels")


def _models_arguments(parser: ArgumentParser) -> None:
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

    from segvit.ops._dispatch import CUDA_MISSING, NATIVE_MISSING

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
        "segvit._C_cuda": CUDA_MISSING or "loaded",
        "SEGVIT_KERNELS": os.environ.get("SEGVIT_KERNELS", "auto"),
    }
    lines |= {name: installed(name) for name in ("torch", "timm", "triton", "torchvision", "numpy", "accelerate")}
    for name, value in lines.items():
        print(f"{name:<15} {value}")


COMMANDS = {
    "demo": ("Train a small model on the embedded data set and write a picture.", _demo_arguments, _demo),
    "check-data": ("What a data set holds, and what is wrong with it.", _check_arguments, _check),
    "train": ("Train on a folder of images and label maps.", _train_arguments, _train),
    "evaluate": ("mIoU and per-class scores of a checkpoint on a folder.", _evaluate_arguments, _evaluate),
    "predict": ("Label maps and overlays of images.", _predict_arguments, _predict),
    "curves": (
        "Loss, mIoU and more against steps, of one or several runs, as a picture.",
        curves_arguments,
        draw_curves,
    ),
    "export": ("A model as an ONNX file or a torch.export program, for any image size.", _export_arguments, _export),
    "models": ("Models by name, with multiply-adds, parameters and licences.", _models_arguments, _models),
    "convert": ("An official checkpoint into ours.", _convert_arguments, _convert),
    "env": ("What a bug report needs: versions, devices, backends.", lambda parser: None, _env),
}
