"""Reading picture files, and saying what was done to their content."""

import io
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from invdiff.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile as PillowFile


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

    The orientation of EXIF is applied, transparency dropped, palettes and CMYK turned into RGB, 16-bit values kept
    where the file has them; sRGB values are kept, not linearised, and a colour profile is not applied.

    Raises
    ------
    InputError
        If the file is missing, cannot be read, is no picture, or truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no picture {path}.")
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or error}.") from error
    return decode(blob, str(path), grey=grey)


def decode(blob: bytes, name: str, *, grey: bool = False) -> ImageFile:
    """Read a picture from a file's bytes; `name` stands for it in errors. See `read_image`."""
    from PIL import Image, UnidentifiedImageError

    notes = ["sRGB values kept as they are (not linearised)"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of metadata that are not needed
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(blob))
            low = _low_bytes(blob, picture, notes)
            turned = _orientation(picture)
            picture.load()
            if (frames := getattr(picture, "n_frames", 1)) > 1:
                notes.append(f"the first of {frames} frames taken")
            orientation = _orientation(picture)  # again: a PNG may say it after its pixels; a TIFF is turned by now
            if turned > 1 or orientation > 1:
                notes.append("EXIF orientation applied")
            if "icc_profile" in picture.info:
                notes.append("colour profile not applied")
            pixels = _levels(picture, low, notes)
    except UnidentifiedImageError:
        raise InputError(f"{name} is not a picture that can be read; give a PNG, JPEG, TIFF or WebP file.") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise InputError(f"{name} has far more pixels than can be solved; resize it first.") from None
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error) as error:
        # Pillow's readers raise all of these on damaged files.
        raise InputError(f"{name} is damaged or truncated ({error}).") from None
    pixels = _upright(pixels, orientation)
    if grey and len(pixels) == 3:
        pixels = (pixels * torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)).sum(0, keepdim=True)
        notes.append("colours averaged to grey (ITU-R 601)")
    if not grey and len(pixels) == 1:
        pixels = pixels.expand(3, -1, -1).contiguous()
        notes.append("grey repeated to three channels")
    return ImageFile(pixels, tuple(notes))


def _orientation(picture: "Image") -> int:
    value = picture.getexif().get(0x0112, 1)
    return int(value) if value in range(1, 9) else 1


def _upright(x: Tensor, orientation: int) -> Tensor:
    """Turn a picture as its orientation from 1 to 8 says: 5 to 8 swap the axes, then rows or columns are reversed."""
    if orientation in (5, 6, 7, 8):
        x = x.transpose(1, 2)
    axes = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation, [])
    return x.flip(axes).contiguous()


def _low_bytes(blob: bytes, picture: "PillowFile", notes: list[str]) -> "Image | None":
    """Low bytes of 16-bit colours, of which Pillow keeps the high ones; None where there are none or they are lost."""
    from PIL import Image

    modes = [mode for tile in picture.tile for mode in _raw_modes(tile.args)]
    if picture.mode.startswith("I") or not any(mode.endswith((";16B", ";16L", ";16N")) for mode in modes):
        return None
    if picture.format != "PNG" or not set(modes) <= {"RGB;16B", "RGBA;16B"}:
        notes.append("16-bit colours reduced to 8 bits")
        return None
    notes.append("16-bit values scaled by 1/65535")
    low = Image.open(io.BytesIO(blob))
    # Read as the other byte order, what Pillow takes for the high byte is the low one.
    low.tile = [tile._replace(args=str(tile.args).replace("16B", "16L")) for tile in low.tile]
    return low.convert("RGB")


def _raw_modes(args: object) -> list[str]:
    parts = args if isinstance(args, tuple) else (args,)
    return [part for part in parts if isinstance(part, str)]


def _levels(picture: "Image", low: "Image | None", notes: list[str]) -> Tensor:
    """Values in [0, 1], shape (1 or 3, h, w); `low` has the low bytes of 16-bit colours."""
    bands = () if picture.mode == "LAB" else picture.getbands()  # LAB's A is a colour
    if "A" in bands or "a" in bands or "transparency" in picture.info:
        notes.append("alpha dropped")
    if low is not None:
        values = 256.0 * np.asarray(picture.convert("RGB"), np.float64) + np.asarray(low, np.float64)
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)) / 65535.0).float()
    if picture.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        values = np.asarray(picture).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(f"its integers, {values.min():g} to {values.max():g}, are not 16-bit values.")
        notes.append("16-bit values scaled by 1/65535")
        return torch.from_numpy(values / 65535.0).float()[None]
    if picture.mode == "F":
        values = np.asarray(picture).astype(np.float64)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise InputError("a picture of floating-point values must be finite and in [0, 1].")
        return torch.from_numpy(values).float()[None]
    if picture.mode == "P":
        notes.append("palette expanded")
    if picture.mode == "CMYK":
        notes.append("CMYK turned into RGB")
    if picture.mode in ("1", "L", "LA"):
        picture = picture.convert("L") if picture.mode == "1" else picture.getchannel(0)
    else:
        picture = picture.convert("RGBA").convert("RGB") if picture.mode in ("P", "PA") else picture.convert("RGB")
    values8 = np.asarray(picture, np.float32)
    values8 = values8[None] if values8.ndim == 2 else values8.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(values8) / np.float32(255.0))
