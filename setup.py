"""Builds segvit._C, the C++ operators, against LibTorch's stable ABI. All metadata is in pyproject.toml.

No C++ compiler: segvit installs without the library and says so at run time (`segvit env`), unless
SEGVIT_REQUIRE_EXT=1. A compiler that is there and fails is an error: a silent fallback helps nobody.
"""

import os
import shutil
import sysconfig
import warnings

from setuptools import setup

ABI_FLAGS = [
    "-DTORCH_STABLE_ONLY",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DPy_LIMITED_API=0x030a0000",
]
CXX_FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall"]
# What lets sums vectorise without -ffast-math, whose link step would flush denormals in the whole process
CXX_FLAGS += ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]


def find_compiler() -> str | None:
    """The C++ compiler that the build will call; a CXX set by the user counts even when it does not exist."""
    if os.environ.get("CXX"):
        return os.environ["CXX"]
    names = [(sysconfig.get_config_var("CXX") or "").split(" ")[0], "c++", "g++", "clang++"]
    return next((name for name in names if name and shutil.which(name)), None)


def extensions() -> dict:
    compiler = find_compiler()
    if compiler is None:
        message = "no C++ compiler was found (tried CXX, c++, g++, clang++)"
        if os.environ.get("SEGVIT_REQUIRE_EXT") == "1":
            raise SystemExit(f"segvit: {message}, and SEGVIT_REQUIRE_EXT=1 asks for one")
        warnings.warn(f"segvit: {message}; installing without segvit._C, the references will serve", stacklevel=1)
        return {}
    os.environ["CXX"] = compiler
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    cpu = CppExtension(
        "segvit._C",
        ["csrc/bindings.cpp", *(f"csrc/cpu/{op}.cpp" for op in ("mask_decode", "mask_loss", "token_resample"))],
        include_dirs=[os.path.abspath("csrc")],
        extra_compile_args=CXX_FLAGS + ABI_FLAGS,
        py_limited_api=True,
    )
    return {"ext_modules": [cpu], "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)}}


built = extensions()
setup(**built, options={"bdist_wheel": {"py_limited_api": "cp310"}} if built else {})
