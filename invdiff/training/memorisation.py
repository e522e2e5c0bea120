"""Are draws of a prior copies of its training pictures? The nearest training picture of each, by mean square.

Test pictures are searched for in the same way: a prior that has memorised draws pictures far nearer to the training
set than they are. The ratio of the nearest distance to the second nearest, which does not reward smooth pictures, is
below 1/3 for a copy (Yoon, Choi, Kwon, Ryu 2023, "Diffusion probabilistic models generalize when they fail to
memorize").
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from invdiff.training.data import SETS, TileSet, read_split


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The nearest training picture of each of n pictures.

    Parameters
    ----------
    distance
        Root mean square difference a pixel to the nearest, [0, 1], shape (n,).
    second
        The same to the nearest view of another training picture, shape (n,).
    pictures
        The nearest views, shape (n, 3, side, side), in [0, 1].
    """

    distance: Tensor
    second: Tensor
    pictures: Tensor


def _symmetries(x: Tensor, *, aerial: bool) -> Iterator[Tensor]:
    for turned in (x, x.transpose(-1, -2)) if aerial else (x,):
        for upright in (turned, turned.flip(-2)) if aerial else (turned,):
            yield upright
            yield upright.flip(-1)


def views(tiles: TileSet, pictures: Tensor, side: int) -> Iterator[Tensor]:
    """Yield views (n, 3, side, side) in [0, 1] of training pictures (n, 3, s, s), uint8, as training shows them.

    Photographs whole and mirrored. Aerial images averaged down to a multiple of 1 or 2 of `side` and cut every half
    side, in all eight symmetries. The zooms and the other cuts of training are left out.
    """
    x = pictures.float() / 255
    if not tiles.aerial:
        yield from _symmetries(x, aerial=False)
        return
    for scaled in (x, F.avg_pool2d(x, 2)):
        room = range(0, scaled.shape[-1] - side + 1, max(1, side // 2))
        for top in room:
            for left in room:
                yield from _symmetries(scaled[..., top : top + side, left : left + side], aerial=True)


@torch.no_grad()
def nearest(queries: Tensor, folder: Path, sets: Mapping[str, float], *, count: int | None = None) -> Neighbours:
    """Search the training splits of some data sets.

    Parameters
    ----------
    queries
        Pictures (n, 3, side, side) in [0, 1].
    folder
        Where the data are.
    sets
        The data sets, by name in `SETS`.
    count
        Search the first pictures of each set only.
    """
    n, side = len(queries), queries.shape[-1]
    flat = queries.flatten(1)
    squares = flat.square().sum(1)[:, None]
    best = torch.full((n, 2), torch.inf)  # of different training pictures
    found = torch.zeros_like(queries)
    for name in sets:
        pictures = read_split(SETS[name], folder, "train")[:count]
        for chunk in torch.split(pictures, 512):
            closest = torch.full((n, len(chunk)), torch.inf)
            shown = torch.zeros_like(queries)
            nearest_here = torch.full((n,), torch.inf)
            for view in views(SETS[name], chunk, side):
                x = view.flatten(1)
                distance = (squares + x.square().sum(1) - 2 * flat @ x.T).clamp_min(0)
                value, index = distance.min(1)
                closer = value < nearest_here
                shown[closer], nearest_here[closer] = view[index[closer]], value[closer]
                closest = torch.minimum(closest, distance)
            better = nearest_here < best[:, 0]
            found[better] = shown[better]
            best = (
                torch.cat((best, closest.topk(min(2, len(chunk)), dim=1, largest=False).values), 1)
                .topk(2, largest=False)
                .values
            )
    rms = (best / flat.shape[1]).sqrt()
    return Neighbours(distance=rms[:, 0], second=rms[:, 1], pictures=found)
