"""Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") and Box-Muller in plain PyTorch."""

from math import tau

import torch
from torch import Tensor

_M0, _M1, _W0, _W1, _MASK = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def _mul(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * m for 32-bit a held in int64: split m so that no product overflows."""
    low = a * (m & 0xFFFF)
    high = a * (m >> 16) + (low >> 16)  # below 2**49
    return high >> 16, ((high << 16) | (low & 0xFFFF)) & _MASK


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on 32-bit words held in int64 tensors that broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        h0, l0 = _mul(c0, _M0)
        h1, l1 = _mul(c2, _M1)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def philox_words(keys: Tensor, slots: Tensor, step: int, call: int, blocks: int) -> Tensor:
    """Uniform 32-bit words, shape (len(slots), blocks * 4), int64; see `philox_normal`."""
    block = torch.arange(blocks, dtype=torch.int64, device=slots.device)[None]
    counter = (block, slots[:, None], torch.full_like(block, step), torch.full_like(block, call))
    words = philox(counter, (keys[:, :1], keys[:, 1:]))
    return torch.stack([w.expand(len(slots), blocks) for w in words], dim=-1).reshape(len(slots), 4 * blocks)


def philox_normal(keys: Tensor, slots: Tensor, step: int, call: int, size: int, dtype: torch.dtype) -> Tensor:
    """Return normals of the streams, shape (m, size)."""
    w = philox_words(keys, slots, step, call, -(-size // 4)).double()
    # Box-Muller on pairs of words: (0, 1] keeps the logarithm finite.
    u1, u2 = (w[:, 0::2] + 1.0) / 2.0**32, w[:, 1::2] / 2.0**32
    radius = torch.sqrt(-2.0 * torch.log(u1))
    z = torch.stack((radius * torch.cos(tau * u2), radius * torch.sin(tau * u2)), dim=-1)
    return z.reshape(w.shape)[:, :size].to(dtype)
