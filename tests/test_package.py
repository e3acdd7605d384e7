"""What is installed and what importing it costs."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, Ahead

WHEELS = Path(tempfile.gettempdir(), f"segvit-wheel-{os.getpid()}")
AHEAD = Ahead([sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", WHEELS, ROOT])


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_is_quick_and_brings_neither_torch_nor_triton():
    code = (
        "import sys, time; t = time.perf_counter(); import segvit; print(time.perf_counter() - t, sorted(sys.modules))"
    )
    seconds, modules = run(code).split(" ", 1)
    assert float(seconds) < 3
    assert "'torch'" not in modules
    assert "'triton'" not in modules


def test_the_operators_import_neither_timm_nor_triton():
    modules = run("import sys, segvit.ops; print(sorted(m.split('.')[0] for m in sys.modules))")
    assert "'timm'" not in modules
    assert "'triton'" not in modules


def test_public_names_are_there():
    code = "import segvit; print([getattr(segvit, n).__name__ if n != '__version__' else n for n in segvit.__all__])"
    assert "ATMLoss" in run(code)
    assert (
        run("import segvit.ops.reference as r, segvit.ops as o; print(sorted(set(o.__all__) - set(r.__all__)))").strip()
        == "['reference']"
    )


def test_arrows_point_one_way():
    """ops know no models, models and data no training, kernels no dispatch, references no kernels."""
    forbidden = {
        "segvit/ops": (
            "segvit.models",
            "segvit.losses",
            "segvit.training",
            "segvit.cli",
            "segvit.commands",
            "import timm",
        ),
        "segvit/ops/reference": ("segvit.kernels", "_dispatch"),
        "segvit/models": (
            "segvit.cli",
            "segvit.commands",
            "segvit.training",
            "segvit.inference",
            "segvit.losses",
            "segvit.kernels",
        ),
        "segvit/data": (
            "segvit.cli",
            "segvit.commands",
            "segvit.runs",
            "segvit.training",
            "segvit.inference",
            "segvit.models",
        ),
        "kernels": ("segvit",),
    }
    for folder, names in forbidden.items():
        for path in (ROOT / folder).glob("*.py"):
            imports = [line for line in path.read_text().splitlines() if line.lstrip().startswith(("import ", "from "))]
            found = [line for line in imports for name in names if name in line]
            if folder == "segvit/ops":  # a kernel may be imported inside a function, when it is wanted
                found = [line for line in found if not line.startswith(" ")]
            assert not found, f"{path.name}: {found}"


@pytest.fixture(scope="module")
def wheel():
    """The wheel of this checkout."""
    code, said = AHEAD.wait()
    assert code == 0, said[-3000:]
    (path,) = WHEELS.glob("*.whl")
    yield path
    shutil.rmtree(WHEELS)


@pytest.mark.slow
def test_the_wheel_is_one_abi3_wheel_with_the_kernels_inside(wheel):
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "segvit/kernels/atm.py" in names
    assert "segvit/_C.abi3.so" in names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "bench/"))]
    endings = (".py", ".yaml", ".txt")
    tracked = {str(p.relative_to(ROOT)) for p in (ROOT / "segvit").rglob("*") if p.suffix in endings}
    assert len(tracked) > 45
    assert tracked <= set(names)


def build(kind: str, tree: Path, out: Path) -> Path:
    """The sdist or wheel that the build backend makes of a source tree; without CUDA, which takes minutes."""
    code = f"import setuptools.build_meta as backend; print(backend.build_{kind}({str(out)!r}))"
    environment = os.environ | {"SEGVIT_CUDA": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_sdist_holds_what_a_wheel_is_built_from(wheel, tmp_path):
    """Made of a clean copy: file lists of an earlier build would hide what MANIFEST.in forgets."""
    tree, needed = tmp_path / "tree", ("segvit", "kernels", "csrc")
    for name in (*needed, "tests", "bench", "docs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    files = {
        str(p.relative_to(tree)) for p in tree.rglob("*") if p.is_file() and p.relative_to(tree).parts[0] in needed
    }
    files |= {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"}
    archive = build("sdist", tree, tmp_path)
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    held = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert files <= held
    assert not [name for name in held if name.startswith(("tests/", "bench/"))]
    built = build("wheel", unpacked, tmp_path)
    assert built.name == wheel.name
    there, here = (set(zipfile.ZipFile(path).namelist()) for path in (built, wheel))
    assert there == here - {"segvit/_C_cuda.abi3.so"}


@pytest.mark.slow
def test_no_compiler_installs_without_the_library_and_a_failing_one_is_an_error(tmp_path):
    """setup.py's decision alone: what extensions() gives, with and without a compiler."""
    code = (
        "import os, sys, setuptools; setuptools.setup = lambda **kw: print(sorted(kw)); "
        f"sys.argv = ['setup.py']; exec(open({str(ROOT / 'setup.py')!r}).read())"
    )
    where = {"PATH": str(tmp_path), "HOME": str(tmp_path), "SEGVIT_CUDA": "0"}
    without = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=where, cwd=ROOT)
    assert "ext_modules" not in without.stdout
    assert "no C++ compiler was found" in without.stderr
    required = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=where | {"SEGVIT_REQUIRE_EXT": "1"}, cwd=ROOT
    )
    assert required.returncode != 0
    both = where | {"SEGVIT_REQUIRE_CUDA": "1"}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, env=both, cwd=ROOT).returncode != 0
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-temp",
        tmp_path / "t",
        "--build-lib",
        tmp_path / "l",
    ]

    failing = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CXX": str(broken)}, cwd=ROOT)
    assert failing.returncode != 0


@pytest.mark.slow
def test_the_cuda_library_is_built_where_a_toolkit_fits(tmp_path):
    """setup.py's decision alone, with made-up toolkits: none, of another version, and one that knows few GPUs."""
    import torch

    if not torch.version.cuda:
        pytest.skip("this PyTorch was built without CUDA")
    code = (
        "import os, sys, setuptools; setuptools.setup = lambda **kw: "
        "print([e.name for e in kw.get('ext_modules', [])], os.environ.get('TORCH_CUDA_ARCH_LIST')); "
        f"sys.argv = ['setup.py']; exec(open({str(ROOT / 'setup.py')!r}).read())"
    )

    def decide(**environment):
        run = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | environment,
        )
        return run.returncode, run.stdout, run.stderr

    def toolkit(version: str, architectures: str) -> str:
        home = tmp_path / version
        (home / "bin").mkdir(parents=True)
        (home / "include").mkdir()
        (home / "include" / "cuda_runtime.h").touch()
        nvcc = home / "bin" / "nvcc"
        lines = [f'case "$1" in --version) echo "Cuda compilation tools, release {version}, V{version}.1";;']
        lines += [f'--list-gpu-arch) printf "{architectures}";; esac']
        nvcc.write_text("#!/bin/sh\n" + " ".join(lines) + "\n")
        nvcc.chmod(0o755)
        return str(home)

    major = torch.version.cuda.split(".")[0]
    code_ok, names, _ = decide(CUDA_HOME=toolkit(f"{major}.0", r"compute_75\ncompute_90\n"))
    assert code_ok == 0
    assert names.split("]")[0] == "['segvit._C', 'segvit._C_cuda'"
    if not torch.cuda.is_available():
        assert "7.5;9.0+PTX" in names
    other = toolkit("9.2", "compute_70")
    code_ok, names, said = decide(CUDA_HOME=other)
    assert code_ok == 0
    assert "_C_cuda" not in names
    assert "has CUDA 9.2" in said
    assert decide(CUDA_HOME=other, SEGVIT_REQUIRE_CUDA="1")[0] != 0
    assert "_C_cuda" not in decide(SEGVIT_CUDA="0")[1]


@pytest.mark.slow
def test_one_build_serves_another_torch(tmp_path):
    """The operators' library, built with this torch, loads in another one and gives the same numbers there."""
    import torch

    from segvit.ops._dispatch import NATIVE_MISSING

    version = os.environ.get("SEGVIT_OTHER_TORCH")
    if not version or NATIVE_MISSING:
        pytest.skip(NATIVE_MISSING or "SEGVIT_OTHER_TORCH names no version to install beside this one, such as 2.13.0")
    if torch.__version__.startswith(version):
        pytest.skip(f"SEGVIT_OTHER_TORCH={version} is the version at hand")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, f"torch=={version}"]
    subprocess.run(pip, check=True)
    code = (
        "import torch, segvit.ops as ops; from segvit.ops._dispatch import NATIVE_MISSING; assert not NATIVE_MISSING;"
        "torch.manual_seed(0); x = torch.randn(2, 36, 44, requires_grad=True); w = torch.ones(44);"
        "y, _, kept = ops.token_downsample(x, w, w, 1e-6, (5, 7), 2, backend='native');"
        "up = ops.token_upsample(kept, y, (5, 7), 2, backend='native'); up.square().sum().backward();"
        "labels = ops.mask_decode(torch.randn(1, 3, 4, 5), torch.rand(1, 3, 3), (30, 40), backend='native');"
        "print(torch.__version__, up.double().sum().item(), x.grad.double().norm().item(), labels.long().sum().item())"
    )
    texts = []
    for first in ([], [str(tmp_path)]):
        env = os.environ | {"PYTHONPATH": os.pathsep.join([*first, str(ROOT)])}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout.split())
    (here, *ours), (there, *theirs) = texts
    assert here == torch.__version__
    assert there.startswith(version)
    for a, b in zip(ours, theirs):
        assert float(a) == pytest.approx(float(b), rel=1e-5)
