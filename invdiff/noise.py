r"""Counter-based noise streams: the same numbers for any micro-batch and any number of devices.

Every number is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of a counter
(block, slot, step, call) under a 64-bit key made of (seed, problem, chain). Nothing is stored between calls but the
step and a count of calls, so a run can be cut anywhere, and no draw depends on who else is drawn beside it. The integer
stream is the same on every device; the normals made from it (Box-Muller in float64) are bitwise equal on one kind of
device.
"""

import hashlib
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from invdiff.errors import InputError
from invdiff.kernels.philox_normal import philox_normal
from invdiff.kernels.philox_uniform import philox_uniform
from invdiff.parallel import ALONE, Shard

_MASK = 0xFFFFFFFF
_SHARED_SLOT = 0xFFFFFFFF  # slot number of the ensemble's own uniform; no particle has it


def stream_key(seed: int, *parts: str | int) -> int:
    """64-bit key of a stream: a hash of the seed and what else tells the stream apart."""
    text = "\x1f".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Noise:
    """Noise of a run of ``len(keys)`` ensembles with ``n`` particles each.

    Parameters
    ----------
    keys
        One 64-bit key an ensemble, from `stream_key`.
    n
        Particles in an ensemble, those of all processes. A flat slot is ``ensemble * n + particle``.
    device, dtype
        Where and as what the numbers are returned.
    shard
        Part of the particles that this process holds; all of them by default.

    Raises
    ------
    InputError
        If there is no particle, or the particles cannot be shared evenly.
    """

    def __init__(
        self,
        keys: Sequence[int],
        n: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        shard: Shard = ALONE,
    ) -> None:
        if n < 1 or not keys:
            raise InputError(f"Noise needs at least one ensemble of one particle, got {len(keys)} of {n}.")
        self.keys, self.n, self.device, self.dtype = tuple(keys), n, torch.device(device), dtype
        self.shard, self._share = shard, shard.share(n)
        self.step = self.call = 0
        self._halves: Tensor | None = None

    def at(self, step: int) -> "Noise":
        """Move to a step of the run; calls are counted from zero again."""
        self.step, self.call = step, 0
        return self

    @property
    def all_slots(self) -> Tensor:
        """Flat slots of all processes, shape (e * n,)."""
        return torch.arange(len(self.keys) * self.n, device=self.device)

    @property
    def slots(self) -> Tensor:
        """Flat slots of this process's particles, shape (e * n / processes,)."""
        if self.shard.world == 1:
            return self.all_slots
        return self.all_slots.reshape(len(self.keys), self.n)[:, self.shard.block(self.n)].flatten()

    def _key(self, ensemble: Tensor) -> Tensor:
        """Halves of the keys of some ensembles, shape (len(ensemble), 2)."""
        if self._halves is None:  # copied once: a copy to the device waits for it
            halves = [[k & _MASK, k >> 32] for k in self.keys]
            self._halves = torch.tensor(halves, dtype=torch.int64, device=self.device)
        return self._halves[ensemble]

    def _counter(self) -> tuple[int, int]:
        self.call += 1
        return self.step & _MASK, self.call - 1

    def normal(self, slots: Tensor, shape: Sequence[int]) -> Tensor:
        """Independent standard normals for the given flat slots, shape (len(slots), *shape)."""
        ensemble, slot = slots // self.n, slots % self.n
        z = philox_normal(self._key(ensemble), slot, *self._counter(), prod(shape), self.dtype)
        return z.reshape(len(slots), *shape)

    def like(self, z: Tensor) -> Tensor:
        """Draw standard normals for all particles of this process's state, shape (e, n / processes, *event)."""
        e, n = z.shape[:2]
        if (e, n) != (len(self.keys), self._share):
            raise InputError(f"The state holds {(e, n)} particles, the noise {(len(self.keys), self._share)}.")
        return self.normal(self.slots, z.shape[2:]).reshape(z.shape).to(z.dtype)

    def uniform(self, slots: Tensor, shape: Sequence[int] = ()) -> Tensor:
        """Independent uniforms in [0, 1) with 53 bits, float64, shape (len(slots), *shape)."""
        ensemble, slot = slots // self.n, slots % self.n
        u = philox_uniform(self._key(ensemble), slot, *self._counter(), prod(shape))
        return u.reshape(len(slots), *shape)

    def shared(self) -> Tensor:
        """One uniform an ensemble in [0, 1), float64, shape (e,); shared by its particles, as resampling needs."""
        ensembles = torch.arange(len(self.keys), device=self.device)
        slot = torch.full_like(ensembles, _SHARED_SLOT)
        return philox_uniform(self._key(ensembles), slot, *self._counter(), 1)[:, 0]
