"""SegViT: semantic segmentation with plain Vision Transformers. Names load on first use (PEP 562)."""

import importlib
import os

__version__ = "0.1.0"

_HOME = {
    "ATMLoss": "losses",
    "SegViT": "models",
    "add_classes": "classes",
    "compiled_step": "step",
    "create_model": "models",
    "explain": "explanation",
    "from_official": "convert",
    "list_models": "models",
    "ops": "ops",
    "predict": "inference",
}
__all__ = [*_HOME, "__version__"]

# In a source checkout the Triton kernels lie beside this package; an installed wheel has them inside.
if os.path.isfile(os.path.join(os.path.dirname(__path__[0]), "setup.py")):
    __path__.append(os.path.dirname(__path__[0]))


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'segvit' has no attribute {name!r}")
    module = importlib.import_module(f"segvit.{_HOME[name]}")
    return module if name == _HOME[name] else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
