"""The `segvit` command. A wrong argument or file ends in one line and exit code 2 or 1, never in a traceback."""

import difflib
import os
import re
import shlex
import sys
from pathlib import Path

import jsonargparse

import segvit
from segvit.commands import COMMANDS, EXAMPLES, RECIPES, recipe_names


class Parser(jsonargparse.ArgumentParser):
    """A wrong argument is one line, not a page of usage."""

    of_command: tuple[str, ...] = ()  # options of the sub-command, for the nearest name

    def flags(self) -> set[str]:
        """Options that are true or false."""
        return {
            name
            for action in self._actions
            if getattr(action, "_typehint", None) in (bool, bool | None)
            for name in action.option_strings
        }

    def error(self, message: str, ex: Exception | None = None):
        line = " ".join(str(message).split())
        unfit = r'Parser key "(\w+)": (?:Does not validate against any|Expected a <class .list.>).*[Vv]alue: (.*)$'
        if match := re.match(unfit, line):
            line = f'--{match[1]} cannot be {match[2]}; lists are written "[1, 2]" and maps "{{1: 2}}", in quotes'
        elif match := re.match(r"unrecognized arguments: (--[\w-]+)", line):
            options = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(match[1], [*options, *self.of_command], n=2)
            line += f"; near: {', '.join(near)}" if near else ""
        elif "File does not exist" in line and '"config"' in line:
            line += f"; recipes that come with segvit: {recipe_names()}"
        raise SystemExit(_fail(f"{self.prog}: {line} (see --help)", 2))


def _fail(line: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")  # set by torchrun
    print(line if rank == "0" else f"process {rank}: {line}", file=sys.stderr)
    return code


def _parse(argv: list[str]):
    """Parsed arguments. Only the named command's are built: the others' would import what they need, for nothing."""
    parser = Parser(prog="segvit", description="Semantic segmentation with plain Vision Transformers.")
    parser.add_argument("--version", action="version", version=f"segvit {segvit.__version__}")
    commands = parser.add_subcommands(dest="command", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (describe, arguments, _) in COMMANDS.items():
        command = Parser(description=describe, epilog=f"example: {EXAMPLES[name]}")
        if name == chosen:
            arguments(command)
            argv = _written_out(argv, command.flags())
            parser.of_command = tuple(option for action in command._actions for option in action.option_strings)
        commands.add_subcommand(name, command, help=describe)
    return parser.parse_args(_recipe_first(argv) if chosen == "train" else argv)


def _written_out(argv: list[str], flags: set[str]) -> list[str]:
    """--flag alone means --flag true, whatever follows it."""
    following = [word.lower() for word in (*argv[1:], "")]
    return [
        f"{word}=true" if word in flags and after not in ("true", "false") else word
        for word, after in zip(argv, following)
    ]


def _recipe_first(argv: list[str]) -> list[str]:
    """--config before all other options, so that they override it; a name that is no file is segvit's own recipe."""
    rest, configs = list(argv), []
    for i, word in reversed(list(enumerate(argv))):
        if word == "--config" and i + 1 < len(argv):
            configs.insert(0, argv[i + 1])
            del rest[i : i + 2]
        elif word.startswith("--config="):
            configs.insert(0, word.removeprefix("--config="))
            del rest[i]
    place = rest.index("train") + 1
    for name in reversed(configs):
        recipe = RECIPES / f"{name}.yaml"
        rest.insert(place, f"--config={recipe if recipe.is_file() and not Path(name).is_file() else name}")
    return rest


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for data or files that do not fit, 2 for wrong arguments."""
    try:
        argv = sys.argv[1:] if argv is None else argv
        arguments = _parse(argv)
        chosen = arguments[arguments.command]
        chosen.typed = shlex.join(["segvit", *argv])
        COMMANDS[arguments.command][2](chosen)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else _fail(str(stop.code), 1) if stop.code else 0
    except (ValueError, RuntimeError, OSError, FloatingPointError, AssertionError) as error:
        if os.environ.get("SEGVIT_TRACEBACK") == "1":
            raise
        return _fail(f"segvit: error: {' '.join(str(error).split())}", 1)
    except KeyboardInterrupt as stop:
        return _fail(f"segvit: {stop or 'stopped'}", 130)
    return 0
