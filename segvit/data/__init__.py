"""Data sets and augmentation."""

from .folder import SegmentationFolder, read_classes
from .images import read_image, read_labels
from .shapes import Shapes

__all__ = ["SegmentationFolder", "Shapes", "read_classes", "read_image", "read_labels"]
