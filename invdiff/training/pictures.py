"""Pictures for a tokenizer, grey or RGB, in [0, 1]: Fashion-MNIST from its original files, or the mixture of tiles."""

import gzip
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, final, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import CatalogueError, InputError
from invdiff.training.data import Mixture, evaluation_pictures, read_tiles

FASHION = "fashion-mnist"
FASHION_TRAIN, FASHION_TEST = "train-images-idx3-ubyte.gz", "fashion_mnist_test2000.png"
"""Files of Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747; MIT): its training pictures as published, and
the first 2000 test pictures as tiles, 50 in a row."""
_VALIDATION = 1000  # last pictures of the training file
_IDX_IMAGES = 0x0803  # unsigned bytes in three dimensions


def read_idx(path: Path) -> Tensor:
    """Read the pictures of a gzipped IDX file, shape (n, h, w), uint8.

    Raises
    ------
    CatalogueError
        If there is no such file.
    InputError
        If it is damaged, or no IDX file of pictures.
    """
    if not path.is_file():
        raise CatalogueError(f"The training data {path} is missing; give its folder with --data or INVDIFF_DATA.")
    try:
        blob = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is damaged or not gzipped: {error}.") from error
    magic, *shape = struct.unpack(">IIII", blob[:16]) if len(blob) >= 16 else (0,)
    if magic != _IDX_IMAGES or len(blob) != 16 + int(np.prod(shape)):
        raise InputError(f"{path} is no IDX file of 8-bit pictures, or holds fewer bytes than its header promises.")
    return torch.from_numpy(np.frombuffer(blob, np.uint8, offset=16).reshape(shape).copy())


@runtime_checkable
class Pictures(Protocol):
    """Where the pictures of a training come from."""

    def batch(self, n: int, generator: torch.Generator) -> Float[Tensor, "n ch side side"]:
        """Draw n pictures in [0, 1]."""
        ...


@final
class FashionPictures:
    """Training pictures of Fashion-MNIST, as they are: its shoes all point to one side, so none is mirrored."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.pictures = read_idx(folder / FASHION_TRAIN)[:-_VALIDATION, None].to(device)

    def batch(self, n: int, generator: torch.Generator) -> Float[Tensor, "n 1 28 28"]:
        """Draw n pictures, with repetition."""
        index = torch.randint(len(self.pictures), (n,), generator=generator, device=self.pictures.device)
        return self.pictures[index].float() / 255


@final
class PhotoPictures:
    """Batches of `Mixture`, in [0, 1]."""

    def __init__(self, folder: Path, weights: Mapping[str, float], side: int, device: torch.device) -> None:
        self.mixture = Mixture(folder, weights, side, device)

    def batch(self, n: int, generator: torch.Generator) -> Float[Tensor, "n 3 side side"]:
        """Draw n pictures; each set has its share."""
        return (self.mixture.batch(n, generator) + 1) / 2


def training_pictures(
    shape: tuple[int, ...], mixture: Mapping[str, float], folder: Path, device: torch.device
) -> Pictures:
    """Open the pictures of a mixture: Fashion-MNIST alone, or data sets of `data.SETS`.

    Raises
    ------
    CatalogueError
        If a file is missing.
    InputError
        If the mixture's pictures do not have that shape, or a file is not what it should be.
    """
    fashion = FASHION in mixture
    if (fashion and (len(mixture) > 1 or shape != (1, 28, 28))) or (not fashion and shape[0] != 3):
        raise InputError(
            f"{FASHION} stands alone, with shape [1, 28, 28]; other data sets are RGB, shape [3, side, side]. "
            f"Got {dict(mixture)} with shape {list(shape)}."
        )
    return FashionPictures(folder, device) if fashion else PhotoPictures(folder, mixture, shape[1], device)


def held_out(name: str, folder: Path, split: str, side: int) -> Float[Tensor, "n ch side side"]:
    """Pictures of a data set's split "validation" or "test", in [0, 1], on the processor.

    Of Fashion-MNIST, the last 1000 pictures of the training file, or the first 2000 of its test set.
    """
    if name != FASHION:
        return evaluation_pictures(name, folder, split, side)
    if split == "validation":
        return read_idx(folder / FASHION_TRAIN)[-_VALIDATION:, None].float() / 255
    if split == "test":
        return read_tiles(folder / FASHION_TEST, 2000, 28, 50)[:, :1].float() / 255
    raise InputError(f"There is no held-out split {split!r}; they are 'validation' and 'test'.")
