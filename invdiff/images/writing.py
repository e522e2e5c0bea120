"""Writing pictures, whole or not at all."""

import os
import tempfile
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import InputError, ShapeError


def write_png(path: str | Path, x: Float[Tensor, "c h w"]) -> Path:
    """Write a picture (1 or 3, h, w) in [0, 1] as 8-bit PNG, whole or not at all; values beyond are clipped.

    Raises
    ------
    ShapeError
        If it is no picture of 1 or 3 channels.
    InputError
        If it holds NaN, or the file cannot be written.
    """
    from PIL import Image

    path = Path(path)
    if x.ndim != 3 or x.shape[0] not in (1, 3):
        raise ShapeError(f"A picture to write has shape (1 or 3, h, w), got {tuple(x.shape)}.")
    if bool(torch.isnan(x).any()):
        raise InputError(f"The picture for {path} holds NaN; nothing was written.")
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
