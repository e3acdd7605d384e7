"""Backbones, the ATM decoder, Shrunk, and the models by name."""

from .registry import ModelInfo, create_model, list_models
from .segvit import SegViT, SegViTOutput

__all__ = ["ModelInfo", "SegViT", "SegViTOutput", "create_model", "list_models"]
