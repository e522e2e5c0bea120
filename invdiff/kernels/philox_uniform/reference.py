"""Uniforms of 53 bits from Philox words in plain PyTorch."""

from torch import Tensor

from invdiff.kernels.philox_normal.reference import philox_words


def unit(high: Tensor, low: Tensor) -> Tensor:
    """Uniform in [0, 1) with 53 bits from two words; in float64 throughout, where every value is exact."""
    return ((high >> 5).double() * 2.0**26 + (low >> 6).double()) / 2.0**53


def philox_uniform(keys: Tensor, slots: Tensor, step: int, call: int, size: int) -> Tensor:
    """Return uniforms of the streams, float64, shape (m, size)."""
    w = philox_words(keys, slots, step, call, -(-size // 2))
    return unit(w[:, 0::2], w[:, 1::2])[:, :size]
