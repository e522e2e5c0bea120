"""JPEG at a number of bits, beside a tokenizer that spends as many.

A tokenizer's picture takes length x log2(V) bits, without any model of the tokens. Of a JPEG file only the
entropy-coded scan is counted: what follows the header of its scan up to the mark of its end. Quantisation tables,
Huffman tables (made for the very picture) and all other headers come free, which favours JPEG.
"""

import io
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import InputError
from invdiff.training.export import psnr

_SUBSAMPLINGS = (0, 2)  # Pillow's 4:4:4 and 4:2:0


def scan_bytes(blob: bytes) -> int:
    """Bytes of the entropy-coded data of a baseline JPEG file of one scan.

    Raises
    ------
    InputError
        If the file has no scan or several.
    """
    place = 2
    while place + 4 <= len(blob) and blob[place] == 0xFF:
        marker, length = blob[place + 1], int.from_bytes(blob[place + 2 : place + 4], "big")
        place += 2 + length
        if marker == 0xDA and blob[-2:] == b"\xff\xd9" and b"\xff\xda" not in blob[place:]:
            return len(blob) - 2 - place
    raise InputError("This is no baseline JPEG file of one scan.")


def encode_jpeg(picture: Any, quality: int, subsampling: int) -> bytes:
    """Encode an array (h, w) or (h, w, 3) of uint8 with Huffman tables of its own."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality, subsampling=subsampling, optimize=True)
    return file.getvalue()


def _best(picture: Any, bits: float, subsampling: int) -> bytes | None:
    """Find the file of the highest quality whose scan fits; None if none does."""
    low, high, best = 0, 101, None
    while high - low > 1:
        quality = (low + high) // 2
        blob = encode_jpeg(picture, quality, subsampling)
        if 8 * scan_bytes(blob) <= bits:
            low, best = quality, blob
        else:
            high = quality
    return best


def _decode(blob: bytes) -> Tensor:
    from PIL import Image

    pixels = np.array(Image.open(io.BytesIO(blob)), np.float32) / 255
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def jpeg_psnr(pictures: Float[Tensor, "n ch h w"], bits: float) -> dict[str, float]:
    """PSNR of JPEG at no more than a number of bits a picture.

    Each picture is encoded at the highest quality that fits, with and without subsampled colours, and the better
    counts. A picture that does not fit at the lowest quality (1) is scored there all the same, which favours JPEG, and
    counted in ``jpeg_too_large``.

    Parameters
    ----------
    pictures
        In [0, 1], grey or RGB.
    bits
        Of entropy-coded data, at most, a picture.

    Returns
    -------
        ``jpeg_psnr`` in dB (mean over pictures), ``jpeg_bits`` (mean that was used), ``jpeg_too_large`` (share).
    """
    scores, sizes, too_large = [], [], 0
    for picture in pictures:
        levels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        levels = np.ascontiguousarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
        choices = _SUBSAMPLINGS if levels.ndim == 3 else (0,)
        found = [blob for s in choices if (blob := _best(levels, bits, s)) is not None]
        too_large += not found
        blobs = found or [encode_jpeg(levels, 1, s) for s in choices]
        values = [float(psnr(_decode(blob)[None], picture[None])) for blob in blobs]
        best = int(np.argmax(values))
        scores.append(values[best])
        sizes.append(8 * scan_bytes(blobs[best]))
    return {
        "jpeg_psnr": float(np.mean(scores)),
        "jpeg_bits": float(np.mean(sizes)),
        "jpeg_too_large": too_large / len(pictures),
    }
