r"""Filters of wavelets, and the sparse matrices that they make of one axis with its boundary.

With filters h_0 (low) and h_1 (high) of even length F and a signal x of length N that is continued beyond its ends,

    c_b[o] = sum_j h_b[j] x[2 o + e - j],    o = 0, ..., m - 1,

where e = 1 and m = floor((N + F - 1) / 2), or, for "periodization", e = F / 2 and m = ceil(N / 2). These are the
definitions of PyWavelets (Lee et al. 2019, JOSS 4:1237), whose names and signs are kept. The synthesis is the transpose
of the same with the reconstruction filters reversed and zeros (or the period) beyond the ends:

    x[2 o + e - j] += g_b[F - 1 - j] c_b[o].
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import CatalogueError, InputError

Mode = Literal["zero", "constant", "symmetric", "reflect", "periodic", "periodization"]
"""What lies beyond the ends of a signal a, b, ..., y, z: 0 0; z z; z y; y x; a b; and a b on an even length, for which
an odd signal repeats its last value."""

# Rows, columns and values (k,) of a sparse matrix; places named twice add up.
Triplets = tuple[Tensor, Tensor, Tensor]


def filter_bank(wavelet: str) -> tuple[Float[Tensor, "2 f"], Float[Tensor, "2 f"]]:
    """Return the low and high filters of a wavelet's analysis and of its synthesis, float64.

    Parameters
    ----------
    wavelet
        Name of an orthogonal or biorthogonal wavelet of PyWavelets, e.g. "db4", "sym8", "coif3" or "bior2.4"; or
        "lazy" (Sweldens 1996, Appl. Comput. Harmon. Anal. 3), whose bands are the even and the odd values themselves.

    Raises
    ------
    CatalogueError
        If there is no such wavelet; the message holds the nearest names.
    """
    import pywt

    if wavelet == "lazy":
        even, odd = [0.0, 1.0], [1.0, 0.0]  # the first tap meets the later value
        return torch.tensor([even, odd], dtype=torch.float64), torch.tensor([odd, even], dtype=torch.float64)
    if wavelet not in (known := pywt.wavelist(kind="discrete")):
        raise CatalogueError.unknown("discrete wavelet", wavelet, ["lazy", *known])
    w = pywt.Wavelet(wavelet)
    analysis, synthesis = (torch.tensor(pair, dtype=torch.float64) for pair in (w.filter_bank[:2], w.filter_bank[2:]))
    return analysis, synthesis


def check_mode(mode: str) -> None:
    """Raise CatalogueError, with the nearest names, unless the boundary mode is known."""
    if mode not in get_args(Mode):
        raise CatalogueError.unknown("boundary mode", mode, get_args(Mode))


def coefficients(length: int, filter_length: int, mode: str) -> int:
    """Return how many coefficients of each band a signal of that length has."""
    check_mode(mode)
    if length < 1:
        raise InputError(f"A signal has at least one value, got {length}.")
    return (length + 1) // 2 if mode == "periodization" else (length + filter_length - 1) // 2


def matrices(length: int, wavelet: str, mode: str) -> tuple[int, Triplets, Triplets]:
    """Return the number of coefficients a band, the analysis, and the transpose of the synthesis.

    Parameters
    ----------
    length
        Values N of the signal, at least one.
    wavelet, mode
        Names, as for `filter_bank` and in `Mode`.

    Returns
    -------
    tuple
        m, and two sparse matrices of shape (2 m, N), the low band's rows first.

    Raises
    ------
    CatalogueError
        If there is no such wavelet or mode.
    InputError
        If the length is not positive.
    """
    dec, rec = filter_bank(wavelet)
    size = dec.shape[1]
    m = coefficients(length, size, mode)
    shift = size // 2 if mode == "periodization" else 1
    o, j = torch.meshgrid(torch.arange(m), torch.arange(size), indexing="ij")
    at = 2 * o + shift - j
    beyond: Literal["zero", "periodization"] = "periodization" if mode == "periodization" else "zero"
    period = 2 * m  # a synthesis on an even length; the value that an odd signal lacks is dropped
    back = at % period if beyond == "periodization" else at
    return (
        m,
        _triplets(dec[:, None, :].expand(-1, m, -1), o, _continued(at, length, mode), length),
        _triplets(rec.flip(1)[:, None, :].expand(-1, m, -1), o, back, length),
    )


def _continued(at: Tensor, n: int, mode: str) -> Tensor:
    """Place whose value a signal of length n has at places that may lie beyond its ends; -1 where it is zero."""
    if mode == "constant":
        return at.clamp(0, n - 1)
    if mode == "symmetric":
        at = at % (2 * n)
        return torch.minimum(at, 2 * n - 1 - at)
    if mode == "reflect":
        period = max(1, 2 * n - 2)
        at = at % period
        return torch.minimum(at, period - at) if n > 1 else torch.zeros_like(at)
    if mode == "periodic":
        return at % n
    if mode == "periodization":
        return (at % (n + n % 2)).clamp(max=n - 1)
    return torch.where((at >= 0) & (at < n), at, -1)


def _triplets(values: Tensor, o: Tensor, columns: Tensor, length: int) -> Triplets:
    rows = torch.stack((o, o + len(o)))
    columns = columns.expand_as(rows)
    keep = (columns >= 0) & (columns < length) & (values != 0)
    return rows[keep], columns[keep], values[keep]
