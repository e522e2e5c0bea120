"""Picture files: reading with what was done to them said, padding, resizing, writing whole or not at all."""

import io
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from invdiff.cards import find
from invdiff.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from invdiff.card_models import DataCard


@dataclass(frozen=True)
class ImageFile:
    """A picture read from a file.

    Parameters
    ----------
    pixels
        Shape (c, h, w), c = 1 or 3, float32 in [0, 1], encoded sRGB values as they stand in the file.
    notes
        What was done to the file's content, in words.
    """

    pixels: Tensor
    notes: tuple[str, ...]


def read_image(path: str | Path, *, grey: bool = False) -> ImageFile:
    """Read a picture as (3, h, w), or (1, h, w) if grey.

    The orientation of EXIF is applied, transparency dropped, palettes and CMYK turned into RGB; sRGB values are kept, not linearised.

    Raises
    ------
    InputError
        If the file is missing, no picture, or truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no picture {path}.")
    return _decode(path.read_bytes(), str(path), grey=grey)


def _decode(blob: bytes, name: str, *, grey: bool) -> ImageFile:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture: Image.Image = Image.open(io.BytesIO(blob))
            picture.load()
    except UnidentifiedImageError:
        raise InputError(f"{name} is not a picture that can be read; give a PNG, JPEG, TIFF or WebP file.") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise InputError(f"{name} has far more pixels than can be solved; resize it first.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{name} is damaged or truncated ({error}).") from None
    notes = ["sRGB values kept as they are (not linearised)"]
    if getattr(picture, "n_frames", 1) > 1:
        notes.append(f"the first of {picture.n_frames} frames taken")  # type: ignore[attr-defined]
    if picture.getexif().get(0x0112, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
        notes.append("EXIF orientation applied")
    pixels = _levels(picture, notes)
    if grey and len(pixels) == 3:
        pixels = (pixels * torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)).sum(0, keepdim=True)
        notes.append("colours averaged to grey (ITU-R 601)")
    if not grey and len(pixels) == 1:
        pixels = pixels.expand(3, -1, -1).contiguous()
        notes.append("grey repeated to three channels")
    return ImageFile(pixels, tuple(notes))


def _levels(picture: "Image", notes: list[str]) -> Tensor:
    """Values in [0, 1], shape (1 or 3, h, w)."""
    if picture.mode in ("I;16", "I;16B", "I;16L", "I"):
        values = np.asarray(picture).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(f"The picture's integers, {values.min():g} to {values.max():g}, are not 16-bit values.")
        notes.append("16-bit values scaled by 1/65535")
        return torch.from_numpy(values / 65535.0).float()[None]
    if picture.mode == "F":
        values = np.asarray(picture).astype(np.float64)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise InputError("A picture of floating-point values must be finite and in [0, 1].")
        return torch.from_numpy(values).float()[None]
    if picture.mode == "P":
        notes.append("palette expanded")
    if picture.mode == "CMYK":
        notes.append("CMYK turned into RGB")
    if "A" in picture.getbands() or "transparency" in picture.info:
        notes.append("alpha dropped")
    if picture.mode in ("1", "L", "LA", "La"):
        picture = picture.convert("L") if picture.mode == "1" else picture.getchannel(0)
    else:
        picture = picture.convert("RGBA").convert("RGB") if picture.mode in ("P", "PA") else picture.convert("RGB")
    values8 = np.asarray(picture)
    values8 = values8[None] if values8.ndim == 2 else values8.transpose(2, 0, 1)
    return torch.from_numpy(values8.astype(np.float32) / 255.0)


def pad_to_multiple(x: Tensor, multiple: int) -> tuple[Tensor, tuple[slice, slice]]:
    """Pad (c, h, w) at the bottom and right to sides divisible by `multiple`, by reflection; and the slices that crop it back."""
    h, w = x.shape[-2:]
    rows, columns = (torch.arange(-(-side // multiple) * multiple) for side in (h, w))

    def reflected(i: Tensor, side: int) -> Tensor:
        period = max(1, 2 * (side - 1))
        i = i % period
        return torch.where(i < side, i, period - i)

    padded = x[..., reflected(rows, h), :][..., reflected(columns, w)]
    return padded, (slice(0, h), slice(0, w))


def resize_image(x: Tensor, long_side: int) -> Tensor:
    """Scale a picture (c, h, w) to a longer side of `long_side` pixels, anti-aliased bicubic, clipped to [0, 1]."""
    scale = long_side / max(x.shape[-2:])
    size = [max(1, round(side * scale)) for side in x.shape[-2:]]
    return F.interpolate(x[None], size=size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0.0, 1.0)


def write_png(path: str | Path, x: Tensor) -> Path:
    """Write a picture (1 or 3, h, w) in [0, 1] as 8-bit PNG, whole or not at all; values beyond are clipped.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    from PIL import Image

    path = Path(path)
    levels = (x.detach().cpu().float().clamp(0, 1) * 255.0).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
    partial: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".png")
        partial = Path(name)
        with os.fdopen(handle, "wb") as file:
            picture.save(file, format="PNG")
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        partial.replace(path)
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
    return path


def read_tiles(path: Path, side: int, columns: int, indices: Sequence[int]) -> Tensor:
    """Some tiles (n, c, side, side) of a picture that is a grid of square tiles, row by row, in [0, 1]."""
    pixels = read_image(path).pixels
    h, w = pixels.shape[1:]
    if w != columns * side or h % side or max(indices) >= (h // side) * columns:
        raise InputError(f"{path} of {h} x {w} pixels is no grid of {columns} tiles of {side} in a row that holds tile {max(indices)}.")
    return torch.stack(
        [pixels[:, (i // columns) * side :, (i % columns) * side :][:, :side, :side] for i in indices]
    )


def _area(x: Tensor, side: int) -> Tensor:
    if x.shape[-1] == side:
        return x
    return F.interpolate(x[None], size=(side, side), mode="area")[0]


def load_image(card: "DataCard", index: int, side: int, *, data: str | Path | None = None) -> Tensor:
    """Picture `index` of a data set's test split, as a square (3, side, side) in [0, 1], averaged down where it is larger.

    Parameters
    ----------
    card
        Card of the data set.
    index
        From 0; for the readers "tiles" and "folder" among the split ``test`` where the card has one.
    side
        Side in pixels.
    data
        Folder of the files; the environment variable INVDIFF_DATA if None.

    Raises
    ------
    InputError
        If the index is out of range or a file is missing.
    """
    if card.reader == "skimage":
        _in_range(card, index, len(card.entries))
        entry = card.entries[index]
        source = files("skimage") / "data" / entry.file
        try:
            blob = source.read_bytes()
        except OSError as error:
            raise InputError(f"The installed scikit-image does not hold {entry.file}, which {card.name} needs ({error}).") from error
        left, top, length = entry.box
        pixels = _decode(blob, entry.file, grey=False).pixels[:, top : top + length, left : left + length]
        return _area(pixels, side)
    folder = data if data is not None else os.environ.get("INVDIFF_DATA")
    if folder is None:
        raise InputError(
            f"The data set {card.name} is not part of the package: get it from its source ({card.source}) and name its folder with "
            "--data or the environment variable INVDIFF_DATA."
        )
    root = Path(folder)
    if card.reader == "folder":
        paths = sorted(p for p in root.iterdir() if p.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"})
        _in_range(card, index, len(paths))
        pixels = read_image(paths[index]).pixels
        length = min(pixels.shape[1:])
        top, left = ((s - length) // 2 for s in pixels.shape[1:])
        return _area(pixels[:, top : top + length, left : left + length], side)
    return _tile(card, root, index, side)


def _tile(card: "DataCard", root: Path, index: int, side: int) -> Tensor:
    counts = [f.count or 0 for f in card.files]
    first, last = card.splits.get("test", (0, sum(counts)))
    _in_range(card, index, last - first)
    place = first + index
    for file, count in zip(card.files, counts, strict=True):
        if place < count:
            path = root / file.name
            if not path.is_file():
                raise InputError(f"The data set {card.name} needs the file {path}, which is not there; its source: {card.source}.")
            tile = read_tiles(path, card.side or side, card.columns or 1, [place])[0]
            off = (tile.shape[-1] - side) // 2 if tile.shape[-1] % side else 0
            return tile[:, off : off + side, off : off + side] if off else _area(tile, side)
        place -= count
    raise InputError(f"The card of {card.name} counts fewer tiles in its files than its splits name.")


def _in_range(card: "DataCard", index: int, count: int) -> None:
    if not 0 <= index < count:
        raise InputError(f"The data set {card.name} has pictures 0 to {count - 1}, got index {index}.")


def load_data_card(name_or_path: str | Path) -> "DataCard":
    """Card of a data set by name or path."""
    from invdiff.card_models import DataCard, read_card

    card = read_card(find("data", name_or_path), "data")
    assert isinstance(card, DataCard)
    return card
