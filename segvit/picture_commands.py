"""What `segvit curves` and the explanations of `segvit predict` take and do; see commands.py."""

from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser


def explain_arguments(parser: ArgumentParser) -> None:
    """Of predict: whether and what to explain."""
    parser.add_argument(
        "--explain",
        type=bool,
        default=False,
        help="also write NAME_explain.png: where the model hesitates, and masks and confidence of classes by stage; of "
        "the whole image at one scale, shrunk first where it is so large that --mode auto takes windows",
    )
    parser.add_argument(
        "--point", type=list[int] | None, default=None, help='a pixel "[x, y]" of the image whose scores to explain'
    )
    parser.add_argument(
        "--explain_classes", type=list[int | str] | None, default=None, help='to show, "[road, 3]"; else the largest'
    )


def explainer(arguments, model, plan, images: int) -> Callable:
    """A function from an image to its explaining picture (None where none is asked for), with checked arguments."""
    from PIL.Image import Image

    from segvit.explanation import check_point, class_numbers, explain

    point, classes = arguments.point, arguments.explain_classes
    if not arguments.explain:
        if point is not None or classes is not None:
            raise ValueError("--point and --explain_classes go with --explain")
        return lambda image: None
    if point is not None and len(point) != 2:
        raise ValueError(f'--point must be a pixel "[x, y]", got {point}')
    if point is not None and images != 1:
        raise ValueError(f"--point is a pixel of one image, and there are {images}")
    if classes is not None:
        classes = class_numbers(classes, model.class_names)
    pixel = None if point is None else (point[1], point[0])
    options = {"short_side": plan.short_side, "max_pixels": None if plan.mode == "whole" else plan.largest}

    def picture(image):
        if pixel is not None:
            width, height = image.size if isinstance(image, Image) else image.shape[1::-1]
            check_point(pixel, (height, width))
        return explain(model, image, classes, **options).picture(point=pixel)

    return picture


def curves_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", type=str, nargs="+", help="folders of segvit train, or their log.jsonl")
    parser.add_argument("--out", type=str, default="curves.png", help="PNG file to write")


def draw_curves(arguments) -> None:
    from segvit.checkpoints import check_writable
    from segvit.curves import curves, read_log

    out = Path(arguments.out)
    if out.suffix.lower() != ".png" or out.is_dir():
        raise ValueError(f"{out}: name a file for --out that ends in .png")
    page = curves({run: read_log(run) for run in arguments.runs})
    check_writable(out)
    page.save(out)
    print(out)
