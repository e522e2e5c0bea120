"""Long lines on a CPU, where no other axis follows the one that is transformed: one stencil a phase between the ends.

Even and odd samples, or the two bands, are contiguous, so that every phase of the outputs between the ends is a sum of
shifted slices; the few outputs at the ends are summed tap by tap.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, cast


@cache
def accumulation() -> Callable[..., None]:
    """Return ``accumulate(y, x, at, w, count)``: y becomes the sum of w[t] x[at[t] : at[t] + len(y)] over t < count."""
    import numba
    import numpy as np

    # Sums may be reassociated, so that they are made in vectors. Unsigned indices need no check for negative ones.
    @numba.njit(nogil=True, fastmath={"reassoc", "contract"})
    def accumulate(y: Any, x: Any, at: Any, w: Any, count: int) -> None:
        y[:] = 0
        t = 0
        while t + 4 <= count:
            a, b, c, d = at[t], at[t + 1], at[t + 2], at[t + 3]
            wa, wb, wc, wd = w[t], w[t + 1], w[t + 2], w[t + 3]
            for i in range(len(y)):
                low = wa * x[np.uint64(a + i)] + wb * x[np.uint64(b + i)]
                y[i] += low + wc * x[np.uint64(c + i)] + wd * x[np.uint64(d + i)]
            t += 4
        while t < count:
            a, wa = at[t], w[t]
            for i in range(len(y)):
                y[i] += wa * x[np.uint64(a + i)]
            t += 1

    return cast(Callable[..., None], accumulate)


@cache
def split_lines() -> Callable[..., None]:
    """Return the kernel of `split` on lines."""
    import numba
    import numpy as np

    accumulate = accumulation()

    @numba.njit(nogil=True, fastmath={"reassoc", "contract"})
    def lines(
        x: Any,
        out: Any,
        index: Any,
        weights: Any,
        count: Any,
        first: int,
        last: int,
        planes: int,
        length: int,
        m: int,
        start: int,
        stop: int,
    ) -> None:
        half, zero = (length + 1) // 2, weights[0, 0] * 0
        phases = np.zeros(2 * half, x.dtype)  # even samples, then odd ones
        at = np.empty(index.shape[1], np.int64)
        for item in range(start, stop):
            line = x[item * length : (item + 1) * length]
            even, odd = phases[:half], phases[half:]
            for q in range(length // 2):
                even[q], odd[q] = line[2 * q], line[2 * q + 1]
            if length % 2:
                even[half - 1] = line[length - 1]
            for band in range(2):
                to = (item // planes * 2 + band) * planes + item % planes
                y, row = out[to * m : (to + 1) * m], band * m
                if last > first:
                    for t in range(count[row + first]):
                        r = index[row + first, t]
                        at[t] = r // 2 + r % 2 * half
                    accumulate(y[first:last], phases, at, weights[row + first], count[row + first])
                for e in range(m - max(0, last - first)):
                    q = e if e < first else e + max(0, last - first)
                    total = zero
                    for t in range(count[row + q]):
                        total += weights[row + q, t] * line[np.uint64(index[row + q, t])]
                    y[q] = total

    return cast(Callable[..., None], lines)


@cache
def merge_lines() -> Callable[..., None]:
    """Return the kernel of `merge` on lines."""
    import numba
    import numpy as np

    accumulate = accumulation()

    @numba.njit(nogil=True, fastmath={"reassoc", "contract"})
    def lines(
        x: Any,
        out: Any,
        index: Any,
        weights: Any,
        count: Any,
        first: int,
        last: int,
        planes: int,
        length: int,
        m: int,
        start: int,
        stop: int,
    ) -> None:
        n, zero = last - first, weights[0, 0] * 0
        even, odd = np.zeros(n, x.dtype), np.zeros(n, x.dtype)
        at = np.empty(index.shape[1], np.int64)
        for item in range(start, stop):
            low = (item // planes * 2 * planes + item % planes) * m
            high = low + planes * m - m  # where the index m, the high band's first, would begin
            y = out[item * length : (item + 1) * length]
            if n > 0:
                for phase in range(2):
                    row = 2 * first + phase
                    for t in range(count[row]):
                        r = index[row, t]
                        at[t] = r + (low if r < m else high)
                    accumulate(odd if phase else even, x, at, weights[row], count[row])
                inner = y[2 * first : 2 * last]
                for q in range(n):
                    inner[2 * q], inner[2 * q + 1] = even[q], odd[q]
            for e in range(length - 2 * n):
                row = e if e < 2 * first else e + 2 * n
                total = zero
                for t in range(count[row]):
                    r = index[row, t]
                    total += weights[row, t] * x[np.uint64(r + (low if r < m else high))]
                y[row] = total

    return cast(Callable[..., None], lines)
