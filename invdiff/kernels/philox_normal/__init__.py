"""Standard normals of counter-based streams: Philox4x32-10 words and Box-Muller, in one pass on a CUDA device."""

import torch
from torch import Tensor

from invdiff.kernels import version
from invdiff.kernels.philox_normal import reference


def philox_normal(keys: Tensor, slots: Tensor, step: int, call: int, size: int, dtype: torch.dtype) -> Tensor:
    """Return normals of the streams: row i has the counter (block, slots[i], step, call) under the key keys[i].

    The words are the same everywhere; the normals are made from them in float64, and are bitwise equal on one kind of
    device.

    Parameters
    ----------
    keys
        Low and high 32 bits of each row's key, shape (m, 2), int64.
    slots
        Each row's second counter word, shape (m,), int64, in [0, 2^32).
    step, call
        Third and fourth counter words, in [0, 2^32).
    size
        Normals a row.
    dtype
        What they are rounded to.

    Returns
    -------
    Tensor
        Shape (m, size).
    """
    if version("philox_normal", keys) == "gpu":
        from invdiff.kernels.philox_normal import gpu

        return gpu.philox_normal(keys, slots, step, call, size, dtype)
    return reference.philox_normal(keys, slots, step, call, size, dtype)
