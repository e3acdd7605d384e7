"""Builds the operators in C++ (segvit._C) and CUDA (segvit._C_cuda) on LibTorch's stable ABI. Metadata: pyproject.toml.

No C++ compiler, or no CUDA toolkit that fits PyTorch: segvit installs without that library and says so at run time
(`segvit env`), unless SEGVIT_REQUIRE_EXT=1 or SEGVIT_REQUIRE_CUDA=1. A compiler that is there and fails is an error;
SEGVIT_CUDA=0 leaves the CUDA library out.
"""

import glob
import os
import shutil
import sysconfig
import warnings

from setuptools import setup

ABI_FLAGS = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]
CXX_FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall"]
# What lets sums vectorise without -ffast-math, whose link step would flush denormals in the whole process
CXX_FLAGS += ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden"]
HEADERS = sorted(glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.cuh", recursive=True))
ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0")  # of GPUs to build for where none is at hand
SOURCES = [f"csrc/cpu/{op}.cpp" for op in ("mask_decode", "mask_loss", "token_resample")]


def find_compiler() -> str | None:
    """The C++ compiler that the build will call; a CXX set by the user counts even when it does not exist."""
    if os.environ.get("CXX"):
        return os.environ["CXX"]
    names = [(sysconfig.get_config_var("CXX") or "").split(" ")[0], "c++", "g++", "clang++"]
    return next((name for name in names if name and shutil.which(name)), None)


def find_cuda() -> str | None:
    """Folder of a whole CUDA toolkit (compiler and headers; a wrapper of nvcc on the PATH is none)."""
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    folders = [*filter(None, named), *([os.path.dirname(os.path.dirname(os.path.realpath(nvcc)))] if nvcc else [])]
    parts = ("bin/nvcc", "include/cuda_runtime.h")
    return next((f for f in folders if all(os.path.exists(os.path.join(f, part)) for part in parts)), None)


def left_out(library: str, reason: str, required: str) -> None:
    if os.environ.get(required) == "1":
        raise SystemExit(f"segvit: {reason}, and {required}=1 asks for it")
    warnings.warn(f"segvit: {reason}; installing without {library}, the references will serve", stacklevel=2)


def cuda_extension():
    """segvit._C_cuda, for the GPUs of this machine, or without one for those of the last years."""
    if os.environ.get("SEGVIT_CUDA") == "0":
        return None
    home = find_cuda()
    if home:
        os.environ["CUDA_HOME"] = home
    import torch
    from torch.utils import cpp_extension

    built_for = torch.version.cuda
    if not built_for:
        return left_out("segvit._C_cuda", "this PyTorch was built without CUDA", "SEGVIT_REQUIRE_CUDA")
    if not home:
        return left_out("segvit._C_cuda", "no CUDA toolkit was found (CUDA_HOME names one)", "SEGVIT_REQUIRE_CUDA")
    nvcc = lambda option: os.popen(f'"{home}/bin/nvcc" {option}').read()  # noqa: E731
    version = nvcc("--version").partition("release ")[2].split(",")[0]
    if version.split(".")[0] != built_for.split(".")[0]:
        reason = f"PyTorch was built for CUDA {built_for}, but {home} has CUDA {version or 'of an unknown version'}"
        return left_out("segvit._C_cuda", reason, "SEGVIT_REQUIRE_CUDA")
    if not torch.cuda.is_available():
        known = [
            arch for arch in ARCHITECTURES if "compute_" + arch.replace(".", "") in nvcc("--list-gpu-arch").split()
        ]
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(known) + "+PTX")
    extension = cpp_extension.CUDAExtension(
        "segvit._C_cuda",
        ["csrc/bindings_cuda.cpp", "csrc/cuda/token_resample.cu"],
        include_dirs=[os.path.abspath("csrc")],
        depends=HEADERS,
        extra_compile_args={"cxx": [*CXX_FLAGS, *ABI_FLAGS], "nvcc": [*NVCC_FLAGS, *ABI_FLAGS]},
        extra_link_args=["-lcudart_static", "-ldl", "-lpthread", "-lrt"],
        py_limited_api=True,
    )
    extension.libraries = ["c10", "torch_cpu", "torch_cuda"]  # not c10_cuda, nor a CUDA runtime of one version
    return extension


def extensions() -> dict:
    compiler = find_compiler()
    if compiler is None:
        for library, required in (("segvit._C", "SEGVIT_REQUIRE_EXT"), ("segvit._C_cuda", "SEGVIT_REQUIRE_CUDA")):
            left_out(library, "no C++ compiler was found (tried CXX, c++, g++, clang++)", required)
        return {}
    os.environ["CXX"] = compiler
    cuda = cuda_extension()
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    cpu = CppExtension(
        "segvit._C",
        ["csrc/bindings.cpp", *SOURCES],
        include_dirs=[os.path.abspath("csrc")],
        depends=HEADERS,
        extra_compile_args=CXX_FLAGS + ABI_FLAGS,
        py_limited_api=True,
    )
    found = [cpu] if cuda is None else [cpu, cuda]
    return {"ext_modules": found, "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)}}


built = extensions()
setup(**built, options={"bdist_wheel": {"py_limited_api": "cp310"}} if built else {})
