"""Filter banks compiled for a CPU: every output is a weighted sum of rows of the input.

Where other axes follow the one that is transformed its rows are contiguous. Where none does, or few values do, lines
are laid across, `_LANES` side by side, and back afterwards; long ones go to `invdiff.kernels.wavelet.cpu_lines`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from invdiff.kernels.threads import share
from invdiff.kernels.wavelet.cpu_lines import accumulation, merge_lines, split_lines

_CHUNK = 1024
"""Values of a row that are worked on together: a window of rows stays in the first-level cache."""
_BLOCK = 8
"""Pairs of outputs an item of work."""
_LONG, _FEW = 100, 18
"""Least pairs of outputs of a long line, of which at most one in `_FEW` is at its ends: measured, 8 taps, float32."""
_LANES = 128
"""Short lines that are worked on together."""
_NARROW = 16
"""Rows with fewer values are taken as lines."""
_LEAST = 500_000
"""Products below which a part is not worth a thread."""


@cache
def _rows() -> Callable[..., None]:
    import numba
    import numpy as np

    accumulate = accumulation()

    @numba.njit(nogil=True)
    def rows(
        x: Any,
        out: Any,
        index: Any,
        weights: Any,
        count: Any,
        split: bool,
        planes: int,
        length: int,
        m: int,
        inner: int,
        start: int,
        stop: int,
    ) -> None:
        pairs = m if split else (length + 1) // 2
        blocks, chunks = (pairs + _BLOCK - 1) // _BLOCK, (inner + _CHUNK - 1) // _CHUNK
        at = np.empty(index.shape[1], np.int64)
        for item in range(start, stop):
            block, chunk = item % blocks, item // blocks % chunks
            plane, o = item // (blocks * chunks) % planes, item // (blocks * chunks * planes)
            begin = chunk * _CHUNK
            n = min(_CHUNK, inner - begin)
            for q in range(block * _BLOCK, min(pairs, (block + 1) * _BLOCK)):
                for phase in range(2):
                    if split:
                        row, to = phase * m + q, ((o * 2 + phase) * planes + plane) * m + q
                    else:
                        row = 2 * q + phase
                        if row == length:
                            break
                        to = (o * planes + plane) * length + row
                    for t in range(count[row]):
                        r = index[row, t]
                        if split:
                            r += (o * planes + plane) * length
                        elif r < m:
                            r += (o * 2 * planes + plane) * m
                        else:
                            r += ((o * 2 + 1) * planes + plane) * m - m
                        at[t] = r * inner + begin
                    y = out[to * inner + begin : to * inner + begin + n]
                    accumulate(y, x, at, weights[row], count[row])

    return cast(Callable[..., None], rows)


@cache
def _across() -> Callable[..., None]:
    import numba
    import numpy as np

    accumulate = accumulation()

    @numba.njit(nogil=True)
    def across(
        x: Any,
        out: Any,
        index: Any,
        weights: Any,
        count: Any,
        split: bool,
        total: int,
        planes: int,
        length: int,
        m: int,
        inner: int,
        start: int,
        stop: int,
    ) -> None:
        inputs, outputs = (length, 2 * m) if split else (2 * m, length)
        beside, result = np.empty(inputs * _LANES, x.dtype), np.empty(outputs * _LANES, x.dtype)
        at = np.empty(index.shape[1], np.int64)
        for item in range(start, stop):
            first = item * _LANES
            n = min(_LANES, total - first)
            for lane in range(n):
                block, part = (first + lane) // inner, (first + lane) % inner
                signal = block * length * inner + part
                low = (block // planes * 2 * planes + block % planes) * m * inner + part
                high = low + planes * m * inner
                if split:
                    for i in range(length):
                        beside[np.uint64(i * _LANES + lane)] = x[np.uint64(signal + i * inner)]
                else:
                    for i in range(m):
                        beside[np.uint64(i * _LANES + lane)] = x[np.uint64(low + i * inner)]
                    for i in range(m):
                        beside[np.uint64((m + i) * _LANES + lane)] = x[np.uint64(high + i * inner)]
            for row in range(outputs):
                for t in range(count[row]):
                    at[t] = index[row, t] * _LANES
                accumulate(result[row * _LANES : row * _LANES + n], beside, at, weights[row], count[row])
            for lane in range(n):
                block, part = (first + lane) // inner, (first + lane) % inner
                signal = block * length * inner + part
                low = (block // planes * 2 * planes + block % planes) * m * inner + part
                high = low + planes * m * inner
                if split:
                    for i in range(m):
                        out[np.uint64(low + i * inner)] = result[np.uint64(i * _LANES + lane)]
                    for i in range(m):
                        out[np.uint64(high + i * inner)] = result[np.uint64((m + i) * _LANES + lane)]
                else:
                    for i in range(length):
                        out[np.uint64(signal + i * inner)] = result[np.uint64(i * _LANES + lane)]

    return cast(Callable[..., None], across)


def _apply(x: Tensor, out: Tensor, tables: list[Tensor], sizes: tuple[int, int, int, int], *, split: bool) -> Tensor:
    if out.numel():
        planes, length, m, inner = sizes
        pairs = m if split else (length + 1) // 2
        arrays = [t.numpy() for t in (x.detach().contiguous().view(-1), out.view(-1), *tables[:3])]
        lines, (first, last) = x.shape[0] * planes, tables[3].tolist()
        rest: tuple[int, ...]
        kernel, items, rest = _rows(), lines * -(-inner // _CHUNK) * -(-pairs // _BLOCK), (split, *sizes)
        if inner == 1 and pairs >= _LONG and _FEW * (pairs - last + first) <= pairs:
            kernel, items, rest = split_lines() if split else merge_lines(), lines, (first, last, planes, length, m)
        elif inner == 1 or (inner < _NARROW and length <= _CHUNK):
            kernel, items, rest = _across(), -(-lines * inner // _LANES), (split, lines * inner, *sizes)
        least = max(1, _LEAST * items // (out.numel() * tables[0].shape[1]))
        share(kernel, items, *arrays, *rest, least=least)
    return out


def split(x: Tensor, tables: list[Tensor], m: int) -> Tensor:
    """Both bands of signals: (o, d, N, i) -> (o, 2, d, m, i); see `invdiff.kernels.wavelet`."""
    o, d, length, inner = x.shape
    return _apply(x, torch.empty(o, 2, d, m, inner, dtype=x.dtype), tables, (d, length, m, inner), split=True)


def merge(c: Tensor, tables: list[Tensor], length: int) -> Tensor:
    """Signals of both bands: (o, 2, d, m, i) -> (o, d, N, i); see `invdiff.kernels.wavelet`."""
    o, _, d, m, inner = c.shape
    return _apply(c, torch.empty(o, d, length, inner, dtype=c.dtype), tables, (d, length, m, inner), split=False)
