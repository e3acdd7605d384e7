"""Data sets, their checking, and augmentation."""

from .check import check_data
from .dataset import SegmentationDataset, read_classes
from .images import read_image, read_labels, to_picture
from .layouts import open_data
from .moments import channel_statistics
from .shapes import Shapes

__all__ = [
    "SegmentationDataset",
    "Shapes",
    "channel_statistics",
    "check_data",
    "open_data",
    "read_classes",
    "read_image",
    "read_labels",
    "to_picture",
]
