"""Picture files: reading with what was done to them said, padding, resizing, writing whole or not at all; data sets."""

from invdiff.images.data_sets import load_data_card, load_image, read_tiles
from invdiff.images.reading import ImageFile, read_image
from invdiff.images.shaping import resize_image
from invdiff.images.writing import write_png

__all__ = [
    "ImageFile",
    "load_data_card",
    "load_image",
    "read_image",
    "read_tiles",
    "resize_image",
    "write_png",
]
