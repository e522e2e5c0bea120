"""Uniforms of Philox words compiled for a CPU: nothing in memory but the result."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from invdiff.kernels.threads import share

_SEGMENT = 4096
"""Numbers of an item of work, even."""


@cache
def _uniform() -> Callable[..., None]:
    import numba
    import numpy as np

    M0, M1, W0, W1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57), np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
    MASK, HALF, A, B = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(5), np.uint64(6)

    @numba.njit(nogil=True)
    def uniform(keys: Any, slots: Any, step: Any, call: Any, out: Any, start: int, stop: int) -> None:
        size = out.shape[1]
        parts = (size + _SEGMENT - 1) // _SEGMENT
        for item in range(start, stop):
            row, begin = item // parts, item % parts * _SEGMENT
            key0, key1, slot = np.uint64(keys[row, 0]), np.uint64(keys[row, 1]), np.uint64(slots[row])
            end = min(begin + _SEGMENT, size)
            for block in range(begin // 2, (end + 1) // 2):
                c0, c1, c2, c3 = np.uint64(block), slot, np.uint64(step), np.uint64(call)
                k0, k1 = key0, key1
                for _ in range(10):
                    p0, p1 = c0 * M0, c2 * M1
                    c0, c1, c2, c3 = (p1 >> HALF) ^ c1 ^ k0, p1 & MASK, (p0 >> HALF) ^ c3 ^ k1, p0 & MASK
                    k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
                out[row, 2 * block] = (float(c0 >> A) * 67108864.0 + float(c1 >> B)) / 9007199254740992.0
                if 2 * block + 1 < end:
                    out[row, 2 * block + 1] = (float(c2 >> A) * 67108864.0 + float(c3 >> B)) / 9007199254740992.0

    return uniform


def philox_uniform(keys: Tensor, slots: Tensor, step: int, call: int, size: int) -> Tensor:
    """Return uniforms of the streams, float64, shape (m, size)."""
    out = torch.empty(len(slots), size, dtype=torch.float64)
    parts = -(-size // _SEGMENT)
    share(_uniform(), len(slots) * parts, keys.numpy(), slots.numpy(), step, call, out.numpy(), least=4)
    return out
