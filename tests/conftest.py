"""Shared by all tests: where golden data and real images lie, NaN-poisoned memory, and what a missing part means."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # golden data and images of the developers' workplace; not part of the repository


def kernel(test):
    """Mark a test of a Triton kernel: it runs on a GPU (-m gpu), or interpreted on the CPU (TRITON_INTERPRET=1)."""
    return pytest.mark.gpu(pytest.mark.interpretable(test))


class Ahead:
    """A long command, whose output some slow test of a module looks at, as the module's AHEAD.

    It begins when the tests are collected, and runs beside the others with what they leave of the processor.
    """

    def __init__(self, command: list, **environment: str):
        self.command, self.environment, self.process = [str(word) for word in command], environment, None

    def start(self) -> None:
        if self.process is None:
            self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as the tests run)
            polite = {"preexec_fn": lambda: os.nice(19)} if hasattr(os, "nice") else {}
            environment, streams = os.environ | self.environment, {"stdout": self.output, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(self.command, cwd=ROOT, env=environment, **streams, **polite)

    def wait(self) -> tuple[int, str]:
        """Exit code, and all that it wrote."""
        self.start()
        code = self.process.wait()
        self.output.seek(0)
        return code, self.output.read()


def pytest_collection_finish(session):
    if not session.config.option.collectonly:
        found = {getattr(item.module, "AHEAD", None) for item in session.items if "slow" in item.keywords}
        session.ahead = [ahead for ahead in found if isinstance(ahead, Ahead)]
        for ahead in session.ahead:
            ahead.start()


def pytest_sessionfinish(session):
    for ahead in getattr(session, "ahead", ()):
        if ahead.process.poll() is None:
            ahead.process.terminate()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        interpreted = "interpretable" in item.keywords and os.environ.get("TRITON_INTERPRET") == "1"
        if "gpu" in item.keywords and not interpreted:
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))


@pytest.fixture(scope="session", autouse=True)
def extension():
    """With SEGVIT_REQUIRE_EXT=1 a missing C++ library fails the run: tests of the fallback alone would say nothing."""
    from segvit.ops._dispatch import NATIVE_MISSING

    if os.environ.get("SEGVIT_REQUIRE_EXT") == "1" and NATIVE_MISSING:
        pytest.exit(f"SEGVIT_REQUIRE_EXT=1, but {NATIVE_MISSING}", returncode=3)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory is handed out with NaN (or odd integers) in it: an element that nobody wrote shows.

    Allocations in Python are patched; those in C++ are filled by PyTorch itself in its deterministic mode.
    """

    def poison(allocate):
        def empty(*args, **kwargs):
            t = allocate(*args, **kwargs)
            return t.fill_(float("nan") if t.is_floating_point() else 77)

        return empty

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not beside this checkout (../shared)")
    return path


class Golden:
    """One golden case: its tensors by name, its description, and an assertion with the case's own tolerance."""

    def __init__(self, name: str):
        self.info = json.loads(shared(f"golden/{name}.json").read_text())
        self.tensors = load_file(shared(f"golden/{name}.safetensors"))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def state(self) -> dict[str, torch.Tensor]:
        return {k.removeprefix("state/"): v for k, v in self.tensors.items() if k.startswith("state/")}

    def check(self, name: str, got: torch.Tensor) -> None:
        """Within 20 times the fp32 error that the case states for this tensor (and float32's own rounding of it)."""
        want = self[name]
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
        assert got.isfinite().all(), f"{name}: not finite"
        stated = self.info["tensors"][name]["fp32_vs_fp64_max_abs_err"]
        rounding = torch.finfo(torch.float32).eps * want.abs().max().item()
        error = (got.double() - want.double()).abs().max().item()
        assert error <= 20 * max(stated, rounding), f"{name}: error {error:.2e}, stated fp32 error {stated:.2e}"


@pytest.fixture(scope="session")
def golden():
    """golden(name) loads a case, or skips the test where ../shared is missing."""
    return Golden
