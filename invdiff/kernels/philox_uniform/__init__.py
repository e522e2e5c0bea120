"""Uniforms of counter-based streams: Philox4x32-10 words, two a number, in one pass."""

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from invdiff.kernels import version
from invdiff.kernels.philox_uniform import reference

_LEAST = 2**13
"""Numbers from which the compiled version is faster than PyTorch's operations on a CPU."""


def philox_uniform(
    keys: Int64[Tensor, "m 2"], slots: Int64[Tensor, " m"], step: int, call: int, size: int
) -> Float64[Tensor, "m size"]:
    """Return uniforms of the streams: row i has the counter (block, slots[i], step, call) under the key keys[i].

    Every version returns the same bits: words are integers, and what is made of two of them is exact in float64.

    Parameters
    ----------
    keys
        Low and high 32 bits of each row's key, int64.
    slots
        Each row's second counter word, int64, in [0, 2^32).
    step, call
        Third and fourth counter words, in [0, 2^32).
    size
        Numbers a row.

    Returns
    -------
    Tensor
        In [0, 1), 53 bits each.
    """
    name = version("philox_uniform", keys)
    if torch.compiler.is_compiling():
        name = "reference"
    if name == "gpu":
        from invdiff.kernels.philox_uniform import gpu

        return gpu.philox_uniform(keys, slots, step, call, size)
    if name == "cpu" and len(slots) * size >= _LEAST:
        from invdiff.kernels.philox_uniform import cpu

        return cpu.philox_uniform(keys, slots, step, call, size)
    return reference.philox_uniform(keys, slots, step, call, size)
