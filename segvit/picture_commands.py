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
        "the whole image at one scale, or, where labels are made in windows, of the window around --point",
    )
    parser.add_argument(
        "--point", type=list[int] | None, default=None, help='a pixel "[x, y]" of the image whose scores to explain'
    )
    parser.add_argument(
        "--explain_classes", type=list[int | str] | None, default=None, help='to show, "[road, 3]"; else the largest'
    )


def explainer(arguments, model, plan, images: int) -> Callable:
    """A function from an image and its labels [H, W] to the explaining picture, with checked arguments.

    It gives None where none is asked for.
    """
    from segvit.explanation import check_point, class_numbers, explain

    point, classes = arguments.point, arguments.explain_classes
    if not arguments.explain:
        if point is not None or classes is not None:
            raise ValueError("--point and --explain_classes go with --explain")
        return lambda image, labels: None
    if point is not None and len(point) != 2:
        raise ValueError(f'--point must be a pixel "[x, y]", got {point}')
    if point is not None and images != 1:
        raise ValueError(f"--point is a pixel of one image, and there are {images}")
    if classes is not None:
        classes = class_numbers(classes, model.class_names)
    pixel = None if point is None else (point[1], point[0])

    def picture(image, labels):
        size, options = labels.shape, {"short_side": plan.short_side}
        if pixel is not None:
            check_point(pixel, size)
        if plan.in_windows(size):
            options = {**options, "max_pixels": plan.largest} if pixel is None else window_around(pixel, size, plan)
        explanation = explain(model, image, classes, **options)
        top, left, height, width = explanation.window or (0, 0, *size)
        predicted = labels[top : top + height, left : left + width]
        point = None if pixel is None else (pixel[0] - top, pixel[1] - left)
        return explanation.picture(point=point, note=_difference(explanation, predicted, point))

    return picture


def window_around(pixel: tuple[int, int], size: tuple[int, int], plan) -> dict:
    """Options of explain for a window of prediction with the pixel inside, of an image of this (height, width)."""
    scale = 1 if plan.short_side is None else plan.short_side / min(size)
    sides = [min(max(round(crop / scale), 1), side) for crop, side in zip(plan.crop, size)]
    corner = [min(max(at - side // 2, 0), whole - side) for at, side, whole in zip(pixel, sides, size)]
    short_side = None if plan.short_side is None else max(round(min(sides) * scale), 1)
    return {"window": (*corner, *sides), "short_side": short_side}


def _difference(explanation, predicted, point: tuple[int, int] | None) -> str:
    """What to say where the label map is not what the explanation shows."""
    same = explanation.labels.numpy() == predicted
    if same.all():
        return ""
    said = f"{100 * same.mean():.1f} % of these labels are those of the label map, which was made in another way"
    if point is None:
        return f"{said}."
    label = int(predicted[point])
    names = explanation.class_names
    return f"{said}; at the circle that one says {names[label] if label < len(names) else 'no class'}."


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
