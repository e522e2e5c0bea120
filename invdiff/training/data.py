"""Training pictures: data sets that are grids of tiles, resident in memory, augmented in batches on the device."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from invdiff import images
from invdiff.errors import CatalogueError, InputError


@dataclass(frozen=True, kw_only=True)
class TileSet:
    """A data set stored as pictures that are grids of square tiles, row by row.

    The last file is for validation (its first tiles) and test (its last), the others for training.

    Parameters
    ----------
    name, files
        Name, and each file with its number of tiles.
    side, columns
        Side of a tile in pixels, and tiles in a row of the grid.
    validation, test
        Numbers of tiles of the last file.
    aerial
        Whether up and down, left and right mean nothing in these pictures.
    source, licence, attribution
        For the model card.
    """

    name: str
    files: tuple[tuple[str, int], ...]
    side: int
    columns: int
    validation: int
    test: int
    aerial: bool
    source: str
    licence: str
    attribution: str


SETS: Mapping[str, TileSet] = {
    s.name: s
    for s in (
        TileSet(
            name="caltech64",
            files=(("caltech64_0.webp", 3072), ("caltech64_1.webp", 3072), ("caltech64_2.webp", 3000)),
            side=64,
            columns=64,
            validation=1000,
            test=2000,
            aerial=False,
            source="Caltech-101 (Fei-Fei, Fergus, Perona 2004), photographs at 64 x 64",
            licence="CC BY 4.0",
            attribution="Li, Andreeto, Ranzato, Perona: Caltech 101, CaltechDATA 2022, doi:10.22002/D1.20086.",
        ),
        TileSet(
            name="ucmerced128",
            files=(("ucmerced128_0.webp", 700), ("ucmerced128_1.webp", 700), ("ucmerced128_2.webp", 700)),
            side=128,
            columns=28,
            validation=200,
            test=500,
            aerial=True,
            source="UC Merced Land Use (Yang, Newsam 2010), USGS aerial imagery at 128 x 128",
            licence="public domain",
            attribution="Imagery of the United States Geological Survey, The National Map.",
        ),
    )
}


def read_tiles(path: Path, count: int, side: int, columns: int) -> Tensor:
    """Read the first `count` tiles of a grid, shape (count, 3, side, side), uint8.

    Raises
    ------
    CatalogueError
        If there is no such file.
    InputError
        If it is not that grid.
    """
    if not path.is_file():
        raise CatalogueError(f"The training data {path} is missing; give its folder with --data or INVDIFF_DATA.")
    return (images.read_tiles(path, side, columns, range(count)) * 255).round().to(torch.uint8)


def read_split(tiles: TileSet, folder: Path, split: str) -> Tensor:
    """All tiles of the split ``"train"``, ``"validation"`` or ``"test"``, shape (n, 3, side, side), uint8."""
    if split == "train":
        return torch.cat(
            [read_tiles(folder / file, count, tiles.side, tiles.columns) for file, count in tiles.files[:-1]]
        )
    file, count = tiles.files[-1]
    last = read_tiles(folder / file, count, tiles.side, tiles.columns)
    chosen = {"validation": last[: tiles.validation], "test": last[count - tiles.test :]}
    if split not in chosen:
        raise InputError(f"There is no split {split!r}; the splits are 'train', 'validation' and 'test'.")
    return chosen[split]


def centre_crop(pictures: Tensor, side: int) -> Tensor:
    """Cut the central square of a given side."""
    top, left = (pictures.shape[-2] - side) // 2, (pictures.shape[-1] - side) // 2
    return pictures[..., top : top + side, left : left + side]


def evaluation_pictures(name: str, folder: Path, split: str, side: int = 64) -> Tensor:
    """Pictures of a split as they are scored: whole, or their centre, shape (n, 3, side, side), float32 in [0, 1]."""
    return centre_crop(read_split(SETS[name], folder, split), side).float() / 255


def _crop(pictures: Tensor, index: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Cut a random square of each chosen picture."""
    n, room = len(index), pictures.shape[-1] - side + 1
    corner = torch.randint(room, (2, n, 1), generator=generator, device=pictures.device)
    span = torch.arange(side, device=pictures.device)
    rows, columns = corner[0] + span, corner[1] + span
    channels = torch.arange(3, device=pictures.device)
    return pictures[
        index[:, None, None, None], channels[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]
    ].float()


def augment_aerial(pictures: Tensor, index: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Random crops, half of them of twice the side averaged down 2 x 2; transposed and flipped at random."""
    small = _crop(pictures, index, side, generator)
    wide = F.avg_pool2d(_crop(pictures, index, 2 * side, generator), 2)
    coins = torch.rand(4, len(index), 1, 1, 1, generator=generator, device=pictures.device) < 0.5
    x = torch.where(coins[0], small, wide)
    x = torch.where(coins[1], x.transpose(-1, -2), x)
    x = torch.where(coins[2], x.flip(-2), x)
    return torch.where(coins[3], x.flip(-1), x)


def augment_photos(
    pictures: Tensor, index: Tensor, side: int, generator: torch.Generator, zoomed: float = 0.25
) -> Tensor:
    """Whole tiles mirrored at random, some zoomed by up to 1.25; most stay at scale 1, so that sharpness is learnt."""
    n, device = len(index), pictures.device
    x = pictures[index].float()
    u = torch.rand(4, n, generator=generator, device=device)
    count = round(zoomed * n)  # the index is random already, so the first ones are a random choice
    if count:
        extent = 1.0 / (1.0 + 0.25 * u[0, :count])
        shift = (2 * u[1:3, :count] - 1) * (1 - extent)
        zero = torch.zeros_like(extent)
        theta = torch.stack((torch.stack((extent, zero, shift[0]), 1), torch.stack((zero, extent, shift[1]), 1)), 1)
        grid = F.affine_grid(theta, [count, 3, side, side], align_corners=False)
        zoom = F.grid_sample(x[:count], grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(
            0, 255
        )
        x = torch.cat((zoom, x[count:]))
    return torch.where((u[3] < 0.5)[:, None, None, None], x.flip(-1), x)


class Mixture:
    """Batches from several data sets in fixed proportions, in latent units [-1, 1].

    Parameters
    ----------
    folder
        Where the files are.
    weights
        Share of each data set by its name in `SETS`.
    side
        Side of a training picture.
    device
        Where the pictures stay.
    """

    def __init__(self, folder: Path, weights: Mapping[str, float], side: int, device: torch.device) -> None:
        unknown = set(weights) - set(SETS)
        if unknown or not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise InputError(
                f"The mixture needs non-negative weights for some of {', '.join(SETS)}, got {dict(weights)}."
            )
        total = sum(weights.values())
        self.weights = {name: w / total for name, w in weights.items() if w > 0}
        self.pictures = {name: read_split(SETS[name], folder, "train").to(device) for name in self.weights}
        self.side, self.device = side, device

    def batch(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw a batch of n pictures, shape (n, 3, side, side), float32 in [-1, 1]; each set has its share, rounded."""
        parts, left, share = [], n, 1.0
        for name, weight in self.weights.items():
            count = round(left * weight / share)
            left, share = left - count, max(share - weight, 1e-12)
            pictures = self.pictures[name]
            index = torch.randint(len(pictures), (count,), generator=generator, device=self.device)
            augment = augment_aerial if SETS[name].aerial else augment_photos
            parts.append(augment(pictures, index, self.side, generator))
        return torch.cat(parts) / 127.5 - 1
