"""Curves of a training: loss and its terms, mIoU, learning rate and waiting for data against steps."""

import io
import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from segvit.checkpoints import CURVES, LOG, write_whole
from segvit.visualize import palette

PANELS = {  # name in a record: title of its panel
    "loss": "loss",
    "miou": "mIoU",
    "ce": "classes: cross-entropy (last stage)",
    "focal": "masks: focal loss (last stage)",
    "dice": "masks: dice loss (last stage)",
    "edge": "edges of objects: loss",
    "lr": "learning rate",
    "waiting": "share of the time that waits for data",
}
COLUMNS = 3
MANY = 200  # records: from there on noisy values are pale, and a mean over a fiftieth of them is drawn
MARKED = 30  # records: up to here each has a dot, so that a single one shows
LONGEST = 150  # characters of a run's name
NOISY = ("loss", "ce", "focal", "dice", "edge", "waiting")


def read_log(run: str | Path) -> list[dict]:
    """Records of a run's log.jsonl; a last line that is still being written is left out.

    Raises:
        FileNotFoundError: no such folder, or none of a run.
        ValueError: a damaged line, or no record at all.
    """
    path = Path(run)
    if not path.exists():
        raise FileNotFoundError(f"{run}: no such folder")
    path = path / LOG if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{run}: no {LOG} in this folder; name one that segvit train wrote")
    records, text = [], path.read_text(errors="replace")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if record := _record(line):
            records.append(record)
        elif line.endswith("\n") and not line.isspace():
            raise ValueError(f"{path}: line {number} is no record of a training: {line.strip()[:60]!r}")
    if not records:
        raise ValueError(f"{path}: no records yet; training writes one every ten steps")
    return records


def _record(line: str) -> dict | None:
    """None for what segvit train does not write."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    numbers = isinstance(value, dict) and all(v is None or isinstance(v, int | float) for v in value.values())
    return value if numbers and isinstance(value.get("step"), int) else None


def curves(logs: dict[str, list[dict]]) -> Image.Image:
    """One panel a quantity, one line a run, against steps.

    Args:
        logs: records of each run by name, as read_log gives them. Values that are missing, None or not finite are left
            out.

    Raises:
        RuntimeError: Matplotlib is not installed.
        ValueError: no records.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("curves need Matplotlib: pip install matplotlib") from error

    lines = {name: {run: _points(records, name) for run, records in logs.items()} for name in PANELS}
    lines = {name: {run: p for run, p in found.items() if p[0]} for name, found in lines.items()}
    lines = {name: found for name, found in lines.items() if found}
    if not lines:
        raise ValueError("logs: no run has a record with values to draw")
    rows = -(-len(lines) // COLUMNS)
    above = 0.22 * len(logs) + 0.15  # inches for the runs' names
    height = 2.9 * rows + above
    figure = Figure(figsize=(4.4 * COLUMNS, height), dpi=100, layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - above / height))
    colours = dict(zip(logs, palette(len(logs)) / 255))
    for i, (name, found) in enumerate(lines.items(), 1):
        axes = figure.add_subplot(rows, COLUMNS, i, title=PANELS[name], xlabel="step")
        axes.grid(alpha=0.25)
        axes.set_xlim(0, 1.02 * max(step for steps, _ in found.values() for step in steps))
        for run, (steps, values) in found.items():
            _draw(axes, name, steps, values, colours[run])
        if name != "miou":  # whose small differences count
            axes.set_ylim(0, 1.05 * max(max(values) for _, values in found.values()) or 1)
    for i, run in enumerate(logs):
        name = run if len(run) <= LONGEST else f"…{run[1 - LONGEST :]}"
        top = 1 - (0.2 + 0.22 * i) / height
        options = {"ha": "left", "va": "center", "parse_math": False}
        figure.text(
            0.01, top, f"{name}{_best(*lines.get('miou', {}).get(run, ([], [])))}", color=colours[run], **options
        )
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a run's name
        canvas.draw()
    return Image.fromarray(np.array(canvas.buffer_rgba())[:, :, :3])


def _points(records: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values."""
    known = [(r["step"], r[name]) for r in records if r.get(name) is not None and math.isfinite(r[name])]
    return [step for step, _ in known], [value for _, value in known]


def _best(steps: list[int], values: list[float]) -> str:
    if not values:
        return ""
    i = int(np.argmax(values))
    return f": best mIoU {values[i]:.4f} at step {steps[i]}"


def _draw(axes, name: str, steps: list[int], values: list[float], colour: np.ndarray) -> None:
    many = name in NOISY and len(steps) > MANY
    marker = {"marker": "o", "markersize": 3} if len(steps) <= MARKED else {}
    axes.plot(steps, values, color=colour, linewidth=1, alpha=0.25 if many else 1, **marker)
    if many:
        window = np.ones(len(steps) // 50) / (len(steps) // 50)
        means = (np.convolve(numbers, window, "valid") for numbers in (steps, values))
        axes.plot(*means, color=colour, linewidth=1.5)


def redrawn(run: Path) -> Callable[[dict], None]:
    """A function of a record that draws RUN/curves.png anew after a validation; what fails is said once."""
    failed = []

    def redraw(record: dict) -> None:
        if "miou" not in record:
            return
        try:
            png = io.BytesIO()
            curves({run.name: read_log(run)}).save(png, "png")
            write_whole(run / CURVES, png.getvalue())
        except Exception as error:  # no reason to end a training, whose log has it all
            if not failed:
                tqdm.write(f"{run / CURVES} is not drawn: {' '.join(str(error).split())}", file=sys.stderr)
            failed.append(error)

    return redraw
