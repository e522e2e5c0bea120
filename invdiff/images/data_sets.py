"""Pictures of the catalogue's data sets: inside scikit-image, in grids of tiles, or in a user's folder."""

import hashlib
import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from invdiff.cards import find
from invdiff.errors import ChecksumError, InputError
from invdiff.images.reading import decode, read_image

if TYPE_CHECKING:
    from invdiff.card_models import DataCard

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"}


def read_tiles(path: Path, side: int, columns: int, indices: Sequence[int]) -> Float[Tensor, "n c side side"]:
    """Read some tiles of a picture that is a grid of square tiles, row by row, in [0, 1].

    Raises
    ------
    InputError
        If the picture cannot be read, is no such grid, or does not hold a tile.
    """
    pixels = read_image(path).pixels
    h, w = pixels.shape[1:]
    if w != columns * side or h % side:
        raise InputError(f"{path} of {h} x {w} pixels is no grid of {columns} tiles of {side} x {side} in a row.")
    count = h // side * columns
    if not indices or min(indices) < 0 or max(indices) >= count:
        raise InputError(f"{path} holds the tiles 0 to {count - 1}, got {list(indices)}.")
    corners = [(i // columns * side, i % columns * side) for i in indices]
    return torch.stack([pixels[:, top : top + side, left : left + side] for top, left in corners])


def _to_side(x: Tensor, side: int, name: str) -> Tensor:
    """Average a square picture (c, s, s) down to (c, side, side); exact where side divides s."""
    length = x.shape[-1]
    if length < side:
        raise InputError(f"{name} has {length} x {length} pixels, fewer than the {side} x {side} asked for.")
    return x if length == side else F.interpolate(x[None], size=(side, side), mode="area")[0]


def load_image(
    card: "DataCard", index: int, side: int, *, data: str | Path | None = None
) -> Float[Tensor, "3 side side"]:
    """Read picture `index` of a data set's test split, as a square (3, side, side) in [0, 1].

    Larger ones are averaged down: from the card's box, from a file's centre square, or from the largest multiple of
    `side` in a tile's centre.

    Parameters
    ----------
    card
        Card of the data set.
    index
        From 0; for the readers "tiles" and "folder" (its files by name) among the split ``test`` where the card has it.
    side
        Side in pixels.
    data
        Folder of the files; the environment variable INVDIFF_DATA if None.

    Raises
    ------
    InputError
        If the index is out of range, a file is missing, or a picture is smaller than `side`.
    ChecksumError
        If a file of tiles is not the one that the card names.
    """
    if side < 1:
        raise InputError(f"A picture's side has at least 1 pixel, got {side}.")
    if card.reader == "sequences":
        raise InputError(f"The data set {card.name} holds sequences, not pictures.")
    if card.reader == "skimage":
        return _packaged(card, index, side)
    folder = data if data is not None else os.environ.get("INVDIFF_DATA")
    advice = (
        f"Get {card.name} from its source ({card.source}) and name its folder with --data or the environment "
        "variable INVDIFF_DATA."
    )
    if not folder:
        raise InputError(f"The data set {card.name} is not part of the package. {advice}")
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"There is no folder {root} for the data set {card.name}. {advice}")
    if card.reader == "tiles":
        return _tile(card, root, index, side, advice)
    paths = sorted(p for p in root.iterdir() if p.suffix.lower() in _SUFFIXES)
    if not paths:
        raise InputError(f"The folder {root} holds no picture ({', '.join(sorted(_SUFFIXES))}). {advice}")
    path = paths[_place(card, index, len(paths))]
    pixels = read_image(path).pixels
    length = min(pixels.shape[1:])
    return _to_side(_centre(pixels, length), side, str(path))


def _packaged(card: "DataCard", index: int, side: int) -> Tensor:
    """Read a picture that an installed scikit-image holds."""
    _in_range(card, index, len(card.entries))
    entry = card.entries[index]
    try:
        blob = (files("skimage") / "data" / entry.file).read_bytes()
    except OSError as error:
        raise InputError(
            f"The installed scikit-image does not hold {entry.file}, which {card.name} needs ({error})."
        ) from error
    left, top, length = entry.box
    pixels = decode(blob, entry.file).pixels
    h, w = pixels.shape[1:]
    if left + length > w or top + length > h:
        raise InputError(f"The box {entry.box} of {card.name} does not lie inside {entry.file} of {h} x {w} pixels.")
    return _to_side(pixels[:, top : top + length, left : left + length], side, entry.file)


def _tile(card: "DataCard", root: Path, index: int, side: int, advice: str) -> Tensor:
    assert card.side is not None  # the card's own checks
    assert card.columns is not None
    counts = [f.count or 0 for f in card.files]
    place = _place(card, index, sum(counts))
    which = 0
    while place >= counts[which]:
        place -= counts[which]
        which += 1
    file = card.files[which]
    path = root / file.name
    if not path.is_file():
        raise InputError(f"The data set {card.name} needs the file {path}, which is not there. {advice}")
    status = path.stat()
    found = _sha256(path, status.st_mtime_ns, status.st_size)
    if found != file.sha256:
        raise ChecksumError(
            f"{path} has the SHA-256 {found[:12]}…, the card of {card.name} names {file.sha256[:12]}…: the file is "
            f"damaged or another. {advice}"
        )
    tile = read_tiles(path, card.side, card.columns, [place])[0]
    return _to_side(_centre(tile, max(card.side // side * side, min(side, card.side))), side, f"A tile of {path}")


@lru_cache(maxsize=64)
def _sha256(path: Path, modified: int, size: int) -> str:  # noqa: ARG001 the key: a file that changed is read again
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _centre(x: Tensor, length: int) -> Tensor:
    top, left = ((side - length) // 2 for side in x.shape[1:])
    return x[:, top : top + length, left : left + length]


def _place(card: "DataCard", index: int, count: int) -> int:
    """Place of a picture of the test split among all `count`."""
    first, last = card.splits.get("test", (0, count))
    if last > count:
        raise InputError(f"The test split of {card.name} ends at picture {last}, but there are {count}.")
    _in_range(card, index, last - first)
    return first + index


def _in_range(card: "DataCard", index: int, count: int) -> None:
    if not 0 <= index < count:
        raise InputError(f"The data set {card.name} has pictures 0 to {count - 1}, got index {index}.")


def load_data_card(name_or_path: str | Path) -> "DataCard":
    """Read the card of a data set by name or path."""
    from invdiff.card_models import DataCard, read_card

    card = read_card(find("data", name_or_path), "data")
    assert isinstance(card, DataCard)
    return card
