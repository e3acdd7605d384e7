"""What README.md, CONTRIBUTING.md and docs/ say holds: commands and Python run; links, options and names are there.

A block of commands or Python that cannot run here has `<!-- not run: REASON -->` before it, and is parsed all the same.
Commands run with what costs little: a tiny backbone, two steps, small crops, no download.
"""

import inspect
import itertools
import json
import re
import shlex
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file
from test_convert import official_case

import segvit
import segvit.models
import segvit.step
from segvit.cli import Parser, _parse
from segvit.commands import COMMANDS
from segvit.data import Shapes
from segvit.runs import train_folder

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
PROJECT = (ROOT / "pyproject.toml").read_text()
FOREIGN = {"--nproc_per_node", "--help", "--quick"}  # options of other programs that pages name alone
TRACKED = ("segvit/", "kernels/", "csrc/", "bench/", "tests/", "docs/")


class Block(NamedTuple):
    page: Path
    line: int  # of its first line
    language: str
    text: str
    reason: str | None  # why it does not run here


def blocks(page: Path) -> list[Block]:
    found, language, start, reason, before = [], None, 0, None, ""
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if language is None and line.startswith("```"):
            language, start = line[3:].strip(), number + 1
            marker = re.fullmatch(r"<!-- not run: (.+) -->", before.strip())
            reason = marker[1] if marker else None
        elif language is not None and line.startswith("```"):
            found.append(Block(page, start, language, "\n".join(lines[start - 1 : number - 1]), reason))
            language = None
        before = line if line.strip() else before
    assert language is None, f"{page.name}: a block that begins in line {start - 1} does not end"
    return found


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(block: Block) -> list[list[str]]:
    """The words of each command, without comments; lines that end in a backslash go on."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def options_of(command: str) -> set[str]:
    parser = Parser()
    COMMANDS[command][1](parser)
    return {
        option for action in parser._actions for option in action.option_strings if re.fullmatch(r"--\w[\w-]*", option)
    }


OPTIONS = {command: options_of(command) for command in COMMANDS}


# --- what the pages suppose is there -------------------------------------------------------------------------------


def write_pairs(root: Path, images: str, labels: str, count: int, seed: int, paint=lambda labels: labels) -> None:
    """Photos of 64×48 with label maps, of the embedded data set."""
    for folder in (images, labels):
        (root / folder).mkdir(parents=True, exist_ok=True)
    data = Shapes(count, 64, seed=seed)
    for i in range(count):
        image, truth = data[i]
        Image.fromarray(image.permute(1, 2, 0).numpy()[:48]).save(root / images / f"{i}.png")
        Image.fromarray(paint(truth.numpy()[:48].astype(np.uint8))).save(root / labels / f"{i}.png")


def in_colour(labels: np.ndarray) -> np.ndarray:
    colours = np.array([[0x80, 0x40, 0x80], [0x46, 0x46, 0x46], [0, 0, 0]], np.uint8)
    return colours[np.where(labels == 255, 2, labels > 0)]


def only_last(labels: np.ndarray, first: int) -> np.ndarray:
    """The last two shapes, numbered anew; nothing else is labelled."""
    return np.where((labels == 4) | (labels == 5), labels - 4 + first, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder as a reader of the pages has it: data sets, photos, an official checkpoint, and the run runs/mine."""
    root = tmp_path_factory.mktemp("reader")
    for part, count, seed in (("train", 6, 1), ("val", 2, 2)):
        write_pairs(root / "DATA", f"{part}/images", f"{part}/labels", count, seed)
        write_pairs(root / "CAMVID", part, f"{part}annot", count, seed, lambda labels: labels.clip(max=11))
        write_pairs(
            root / "MASKS", f"{part}/images", f"{part}/masks", count, seed, lambda labels: (labels > 0) * np.uint8(255)
        )
        write_pairs(root / "COLOURS", f"{part}/images", f"{part}/labels", count, seed, in_colour)
        write_pairs(root / "BANDS", f"{part}/images", f"{part}/labels", count, seed)
        for path in (root / "BANDS" / part / "images").iterdir():
            values = np.random.default_rng(0).integers(0, 4000, (48, 64, 7)).astype(np.uint16)
            np.save(path.with_suffix(".npy"), values)
            path.unlink()
    for data, classes in (("DATA", Shapes.classes), ("BANDS", Shapes.classes), ("MASKS", "ab"), ("COLOURS", "ab")):
        (root / data / "classes.txt").write_text("\n".join(classes))
    import tifffile

    tifffile.imwrite(root / "scene.tif", values, planarconfig="contig")
    for part in ("train", "val"):  # two classes that runs/mine does not know, numbered behind its own or from 0
        for data, first in (("NEW", 6), ("MORE", 0)):
            write_pairs(root / data, f"{part}/images", f"{part}/labels", 6, 1, partial(only_last, first=first))
    (root / "NEW" / "classes.txt").write_text("\n".join([*Shapes.classes, "scooter", "tram"]))
    rows = [
        f"DATA/{part}/images/{i}.png,DATA/{part}/labels/{i}.png,{part}" for part in ("train", "val") for i in range(2)
    ]
    (root / "table.csv").write_text("\n".join(["image,label,part", *rows]))
    (root / "folder").mkdir()
    for i, place in enumerate(("photo.jpg", "folder/a.jpg", "folder/b.jpg")):
        Image.fromarray(Shapes(3, 64 + 16 * i)[i][0].permute(1, 2, 0).numpy()).save(root / place)
    state, config = official_case()
    save_file(state, root / "official.safetensors")
    (root / "official.json").write_text(json.dumps(config))
    (root / "three.txt").write_text("a\nb\nc\n")
    small = {"out_indices": [0], "decoder_layers": 1, "backbone_kwargs": {"depth": 1}}  # quick to export
    model = segvit.SegViT("test_vit", num_classes=6, image_size=32, class_names=Shapes.classes, **small)
    model.save_pretrained(root / "small")
    options = {"model": str(root / "small"), "steps": 2, "batch_size": 2, "workers": 0}
    train_folder(str(root / "DATA"), str(root / "runs" / "mine"), **options)
    return root


@pytest.fixture(scope="module")
def done():
    """Commands that have run: a second time they would tell nothing new."""
    return set()


def parsed(words: list[str]):
    """Name and arguments of a command of segvit, by its own parser; None where the options print and leave."""
    try:
        arguments = _parse(words[1:])
    except SystemExit as stop:
        if stop.code:
            pytest.fail(f"refused: {shlex.join(words)}")
        return words[1], None
    return arguments.command, arguments[arguments.command]


def run_segvit(words: list[str], done: set) -> None:
    command, arguments = parsed(words)
    if arguments is None or shlex.join(words) in done:
        return
    done.add(shlex.join(words))
    arguments.typed = shlex.join(words)
    if "device" in arguments:
        arguments.device = "cpu"
    if "workers" in arguments:
        arguments.workers = 0
    if command == "train":
        cheap = {"steps": 2, "batch_size": 2, "backbone": "test_vit", "pretrained": False, "crop": [32, 32]}
        for option, value in cheap.items():
            arguments[option] = value
        if arguments.total_batch:
            arguments.total_batch = 4
        if Path(arguments.out).exists() and not (arguments.resume or arguments.overwrite):
            arguments.out = next(
                f"{arguments.out}_{i}" for i in itertools.count() if not Path(f"{arguments.out}_{i}").exists()
            )
    COMMANDS[command][2](arguments)


def check_command(words: list[str], run) -> None:
    """A command of a known kind, whose files, targets, extras and options are there; `run` takes those of segvit."""
    line = shlex.join(words)
    while "=" in words[0]:  # NAME=value before it
        words = words[1:]
    program, rest = words[0].rpartition("/")[2], words[1:]
    if program == "segvit":
        run(words)
    elif program == "torchrun":
        parsed(words[words.index("-m") + 1 :])
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets), line
    elif program == "pip":
        extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", rest[-1])
        assert rest[:2] == ["install", "-e"], line
        assert extras, line
        assert all(f"\n{extra} = [" in PROJECT for extra in filter(None, (extras[1] or "").split(","))), line
    elif program == "python" and rest[:2] == ["-m", "pytest"]:
        paths = [word for word in rest if word.startswith("tests/")]
        assert all((ROOT / path).exists() for path in paths), line
        assert rest.count("-m") == 1 or f'"{rest[-1]}: ' in PROJECT, line
    elif program == "python":
        check_script(rest, line)
    else:
        assert program in (".", "apt", "git") or (ROOT / words[0]).is_file(), f"a command of an unknown kind: {line}"


def check_script(words: list[str], line: str) -> None:
    """A script of bench/ that is there, and its options."""
    assert (ROOT / words[0]).is_file(), line
    code = (ROOT / words[0]).read_text() + (ROOT / "bench/harness.py").read_text()
    assert all(f'"{word}"' in code for word in words if word.startswith("--")), line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_and_python_run(page, workspace, done, monkeypatch):
    monkeypatch.chdir(workspace)
    eager = partial(segvit.step.compiled_step, backend="eager")  # what the compiler makes of a step is tested elsewhere
    monkeypatch.setattr(segvit, "compiled_step", eager)
    few = segvit.list_models()[:1]
    namespace: dict = {}
    for block in blocks(page):
        if block.language == "python" and block.reason is None:
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)
        elif block.language == "python":
            compile(block.text, str(page), "exec")
        elif block.language == "sh":
            with monkeypatch.context() as patch:
                patch.setattr(segvit, "list_models", lambda: few)  # counting all takes a minute
                for words in commands(block):
                    check_command(words, parsed if block.reason else partial(run_segvit, done=done))
        else:
            assert block.language in ("", "bibtex"), f"{name(page)}:{block.line}: a block of {block.language!r}"


# --- links, paths, names ---------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if i == 0 else f"{slug}-{i}" for slug, count in found.items() for i in range(count + 1)}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_nothing_is_left_to_be_written(page):
    assert not re.findall(r"<!-- (?!not run: ).*", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name(page)}: {target}"
        assert not anchor or anchor in anchors(there), f"{name(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_tests_that_are_named_are_there(page):
    for code in inline_code(page):
        path, _, test = code.partition("::")
        if not path.startswith(TRACKED) or not re.fullmatch(r"[\w./*-]+", path) or "NAME" in path:
            continue
        assert list(ROOT.glob(path)), f"{name(page)}: {code}"
        assert not test or f"\ndef {test}(" in (ROOT / path).read_text(), f"{name(page)}: {code}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_in_the_text_are_options(page):
    everything = FOREIGN.union(*OPTIONS.values())
    for code in inline_code(page):
        words = code.replace("…", "").split()
        if words[:1] == ["segvit"] and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in COMMANDS, f"{name(page)}: {code}"
            used, known = words, OPTIONS[words[1]] | FOREIGN
        elif words[:1] == ["python"] and words[1:2] != ["-m"]:
            check_script(words[1:], f"{name(page)}: {code}")
            continue
        elif words and words[0].startswith("--"):
            used, known = words, everything
        else:
            continue
        for option in (word.partition("=")[0] for word in used if re.match(r"--\w", word)):
            assert option in known, f"{name(page)}: {code}: no option {option}"


def mentioned(option: str, text: str) -> bool:
    return re.search(rf"{re.escape(option)}(?![\w-])", text) is not None


def test_every_command_and_option_is_described():
    text = "\n".join(page.read_text() for page in PAGES)
    assert not [command for command in COMMANDS if f"segvit {command}" not in text and f"`{command}`" not in text]
    train = "\n".join((ROOT / "docs" / f"{page}.md").read_text() for page in ("training", "data", "models"))
    options = [option for option in inspect.signature(train_folder).parameters if option != "data"]
    assert not [option for option in options if not mentioned(f"--{option}", train)]
    others = set().union(*OPTIONS.values())
    assert not [option for option in sorted(others) if not mentioned(option, text)]


def test_every_public_name_is_described():
    text = "\n".join(page.read_text() for page in PAGES)
    for module in (segvit, segvit.models, segvit.ops):
        for public in module.__all__:
            if public == "__version__":
                continue
            told = inspect.getdoc(getattr(module, public)) or ""
            assert told, f"{module.__name__}.{public} has no docstring"
            assert not told.startswith(f"{public}("), f"{module.__name__}.{public} has no docstring of its own"
            assert re.search(rf"\b{public}\b", text), f"{module.__name__}.{public}"


def test_every_environment_variable_is_described_and_no_other():
    sources = [
        ROOT / "setup.py",
        *(p for place in TRACKED[:5] for p in (ROOT / place).rglob("*") if p.suffix in (".py", ".h", ".cpp")),
    ]
    code = "\n".join(path.read_text() for path in sources)
    used = set(re.findall(r"[\"'](SEGVIT_[A-Z_]+)[\"']", code))
    page = (ROOT / "docs" / "environment.md").read_text()
    assert set(re.findall(r"^\| `(SEGVIT_[A-Z_]+)`", page, re.MULTILINE)) == used
    told = set(re.findall(r"\bSEGVIT_[A-Z_]+\b", "\n".join(path.read_text() for path in PAGES)))
    assert told <= used


def test_every_page_is_linked():
    readme, index = (ROOT / "README.md").read_text(), (ROOT / "docs" / "index.md").read_text()
    for page in (page.name for page in DOCS if page.name != "index.md"):
        assert f"](docs/{page})" in readme
        assert f"]({page})" in index


def test_the_version_is_the_same_everywhere():
    assert f'\nversion = "{segvit.__version__}"\n' in PROJECT
    assert f"Version {segvit.__version__}." in (ROOT / "README.md").read_text()
    assert f"\n## {segvit.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
