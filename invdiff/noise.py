r"""Counter-based noise streams: the same numbers for any micro-batch and any number of devices.

Every number is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of a counter
(block, slot, step, call) under a 64-bit key made of (seed, problem, chain). Nothing is stored between calls but the
step and a count of calls, so a run can be cut anywhere, and no draw depends on who else is drawn beside it. The integer
stream is the same on every device; the normals made from it (Box-Muller in float64) are bitwise equal on one kind of
device.
"""

import hashlib
from collections.abc import Sequence
from math import prod, tau

import torch
from torch import Tensor

from invdiff.errors import InputError

_M0, _M1, _W0, _W1, _MASK = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF
_SHARED_SLOT = 0xFFFFFFFF  # slot number of the ensemble's own uniform; no particle has it


def stream_key(seed: int, *parts: str | int) -> int:
    """64-bit key of a stream: a hash of the seed and what else tells the stream apart."""
    text = "\x1f".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


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


def _unit(high: Tensor, low: Tensor) -> Tensor:
    """Uniform in [0, 1) with 53 bits from two words; in float64 throughout, where every value is exact."""
    return ((high >> 5).double() * 2.0**26 + (low >> 6).double()) / 2.0**53


class Noise:
    """Noise of a run of ``len(keys)`` ensembles with ``n`` particles each.

    Parameters
    ----------
    keys
        One 64-bit key an ensemble, from `stream_key`.
    n
        Particles in an ensemble. A flat slot is ``ensemble * n + particle``.
    device, dtype
        Where and as what the numbers are returned.
    """

    def __init__(
        self,
        keys: Sequence[int],
        n: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if n < 1 or not keys:
            raise InputError(f"Noise needs at least one ensemble of one particle, got {len(keys)} of {n}.")
        self.keys, self.n, self.device, self.dtype = tuple(keys), n, torch.device(device), dtype
        self.step = self.call = 0

    def at(self, step: int) -> "Noise":
        """Move to a step of the run; calls are counted from zero again."""
        self.step, self.call = step, 0
        return self

    @property
    def slots(self) -> Tensor:
        """All flat slots, shape (e * n,)."""
        return torch.arange(len(self.keys) * self.n, device=self.device)

    def _words(self, ensemble: Tensor, slot: Tensor, blocks: int) -> Tensor:
        """Uniform 32-bit words, shape (len(slot), blocks * 4), int64."""
        keys = torch.tensor([[k & _MASK, k >> 32] for k in self.keys], dtype=torch.int64, device=self.device)[ensemble]
        block = torch.arange(blocks, dtype=torch.int64, device=self.device)[None]
        counter = (
            block,
            slot[:, None],
            torch.full_like(block, self.step & _MASK),
            torch.full_like(block, self.call),
        )
        words = philox(counter, (keys[:, :1], keys[:, 1:]))
        self.call += 1
        return torch.stack([w.expand(len(slot), blocks) for w in words], dim=-1).reshape(len(slot), -1)

    def normal(self, slots: Tensor, shape: Sequence[int]) -> Tensor:
        """Independent standard normals for the given flat slots, shape (len(slots), *shape)."""
        size = prod(shape)
        w = self._words(slots // self.n, slots % self.n, -(-size // 4)).double()
        # Box-Muller on pairs of words: (0, 1] keeps the logarithm finite.
        u1, u2 = (w[:, 0::2] + 1.0) / 2.0**32, w[:, 1::2] / 2.0**32
        radius = torch.sqrt(-2.0 * torch.log(u1))
        z = torch.stack((radius * torch.cos(tau * u2), radius * torch.sin(tau * u2)), dim=-1)
        return z.reshape(len(slots), -1)[:, :size].reshape(len(slots), *shape).to(self.dtype)

    def like(self, z: Tensor) -> Tensor:
        """Draw standard normals for all particles of a state of shape (e, n, *event)."""
        e, n = z.shape[:2]
        if (e, n) != (len(self.keys), self.n):
            raise InputError(f"The state holds {(e, n)} particles, the noise {(len(self.keys), self.n)}.")
        return self.normal(self.slots, z.shape[2:]).reshape(z.shape).to(z.dtype)

    def uniform(self, slots: Tensor, shape: Sequence[int] = ()) -> Tensor:
        """Independent uniforms in [0, 1) with 53 bits, float64, shape (len(slots), *shape)."""
        size = max(1, prod(shape))
        w = self._words(slots // self.n, slots % self.n, -(-size // 2))
        u = _unit(w[:, 0::2], w[:, 1::2])
        return u[:, :size].reshape(len(slots), *shape)

    def shared(self) -> Tensor:
        """One uniform an ensemble in [0, 1), float64, shape (e,); shared by its particles, as resampling needs."""
        ensembles = torch.arange(len(self.keys), device=self.device)
        w = self._words(ensembles, torch.full_like(ensembles, _SHARED_SLOT), 1)
        return _unit(w[:, 0], w[:, 1])
