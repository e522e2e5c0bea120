"""One ensemble over many processes: each holds a block of the particles' slots and steps it alone.

What is decided about an ensemble (whether and how to resample, what its evidence is) is decided from the log-weights of
all its particles, gathered on every process; sums on GPUs may round differently from process to process, so that a
decision is the first one's. At a resampling only those particles travel whose child lives elsewhere, once to each
process. Noise is keyed by slot, so that the draws are those of a single process.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from jaxtyping import Int
from torch import Tensor

from invdiff import peers
from invdiff.errors import InputError, PeerError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@final
@dataclass(frozen=True)
class Shard:
    """A process's part of the particle axis: the ``rank``-th of ``world`` contiguous blocks of every ensemble.

    ``ALONE`` is that of a single process, for which nothing is ever sent. The methods, but for `share`, `block` and
    `own`, are calls that every process makes, in the same order.

    Parameters
    ----------
    rank, world
        This process, from 0, and the number of processes.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise InputError(f"A shard's rank lies in [0, {self.world}), got {self.rank}.")

    @classmethod
    def current(cls) -> "Shard":
        """Return the shard of this process in the default group of torch.distributed.

        Raises
        ------
        InputError
            If torch.distributed is not initialised.
        """
        return cls(*peers.here())

    def share(self, n: int) -> int:
        """Particles of an ensemble of n on this process.

        Raises
        ------
        InputError
            If n is not a multiple of the number of processes.
        """
        if n % self.world:
            low = n - n % self.world
            near = f"{low} or {low + self.world}" if low else str(self.world)
            raise InputError(f"{n} draws cannot be shared evenly by {self.world} processes; ask for {near}.")
        return n // self.world

    def block(self, n: int) -> slice:
        """Slots on this process of the n of an ensemble."""
        m = self.share(n)
        return slice(self.rank * m, (self.rank + 1) * m)

    def own(self, path: Path) -> Path:
        """Path of this process's part of a file: ``path`` with ``.RANK-of-WORLD``, or as it is for a single process."""
        return path if self.world == 1 else path.with_name(f"{path.name}.{self.rank}-of-{self.world}")

    # Numbers and failures.

    def agree(self, *numbers: float) -> list[list[float]]:
        """Return the numbers (six at most) of every process, by rank, float64: the same lists everywhere."""
        return [list(numbers)] if self.world == 1 else peers.meet("numbers", numbers)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return any(bool(row[0]) for row in self.agree(flag))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave a block together: all at its end, or all with an error.

        An exception within reaches the other processes as a PeerError that names the process, at the latest at their
        own block's end; a KeyboardInterrupt as one. Ctrl-C is noticed when the processes next meet.

        Raises
        ------
        PeerError
            If another process failed within its block, or is lost.
        """
        if self.world == 1:
            yield
            return
        with peers.interrupts_kept_back():
            try:
                yield
                peers.meet("end")
            except BaseException as error:
                if not peers.is_told(error):
                    try:
                        peers.meet("end", error=error)
                    except PeerError:
                        if isinstance(error, KeyboardInterrupt):
                            raise
                    peers.told(error)
                raise

    # Tensors.

    def gather(self, tensor: Tensor) -> Tensor:
        """All blocks along the axis of particles, 1, in order; the same numbers on every process, without gradient.

        From (ensemble, particles of this process, ...) to (ensemble, n, ...).
        """
        if self.world == 1:
            return tensor
        import torch.distributed as dist

        wire = _Wire(tensor)
        sent = wire.put(_as_bytes(tensor))
        parts = [torch.empty_like(sent) for _ in range(self.world)]
        self._meet_alike("gather", tensor)
        with peers.answered():
            dist.all_gather(parts, sent, group=wire.group)
        return torch.cat([_from_bytes(p, tensor) for p in parts], dim=1)

    def first(self, tensor: Tensor) -> Tensor:
        """Return the first process's tensor, of one shape everywhere."""
        if self.world == 1:
            return tensor
        import torch.distributed as dist

        wire = _Wire(tensor)
        sent = wire.put(_as_bytes(tensor)).clone()
        self._meet_alike("first", tensor)
        with peers.answered():
            dist.broadcast(sent, src=0, group=wire.group)
        return _from_bytes(sent, tensor)

    def exchange(self, tensors: Sequence[Tensor], ancestors: Int[Tensor, "ensemble n"]) -> list[Tensor]:
        """Rows of tensors by ancestor within each ensemble.

        Parameters
        ----------
        tensors
            Each (ensemble, particles of this process, ...).
        ancestors
            Slot of each particle's ancestor among those of all processes, the same on every process.

        Returns
        -------
            The tensors with row (e, i) the ancestor's of this process's i-th slot.
        """
        ensembles = torch.arange(len(ancestors), device=ancestors.device)[:, None]
        if self.world == 1:
            return [t[ensembles, ancestors] for t in tensors]
        plan = _Plan.of(self, ancestors.cpu())
        received = self._travel([t.flatten(0, 1) for t in tensors], plan)
        moved = []
        for tensor, rows in zip(tensors, received, strict=True):
            new = tensor.flatten(0, 1)[plan.within.to(tensor.device)]
            new[plan.placed.to(tensor.device)] = rows[plan.taken.to(tensor.device)]
            moved.append(new.reshape(tensor.shape))
        return moved

    def _travel(self, tensors: Sequence[Tensor], plan: "_Plan") -> list[Tensor]:
        """Rows that other processes send, of each tensor (rows, ...): all tensors' bytes in one message."""
        import torch.distributed as dist

        if not plan.anyone:
            return [t[:0] for t in tensors]
        wire = _Wire(tensors[0])
        leaving = plan.leaving.to(tensors[0].device)
        sizes = [prod(t.shape[1:]) * t.element_size() for t in tensors]
        parts = [_as_bytes(t[leaving]).reshape(-1, size) for t, size in zip(tensors, sizes, strict=True)]
        sent = wire.put(torch.cat(parts, dim=1))
        got = torch.empty(sum(plan.received), sum(sizes), dtype=torch.uint8, device=sent.device)
        peers.meet("exchange", (float(len(tensors)), float(sum(sizes))))
        with peers.answered():
            dist.all_to_all_single(got, sent, plan.received, plan.sent, group=wire.group)
        split = torch.split_with_sizes(got, sizes, dim=1)
        columns = [c.clone(memory_format=torch.contiguous_format) for c in split]  # aligned for their dtype
        return [_from_bytes(column, t, len(got)) for column, t in zip(columns, tensors, strict=True)]

    def _meet_alike(self, kind: str, tensor: Tensor) -> None:
        """Meet, and check that all processes bring the same shape."""
        rows = peers.meet(kind, (float(tensor.numel()), float(tensor.element_size())))
        if any(row != rows[0] for row in rows):
            sizes = ", ".join(f"{r}: {int(row[0])}" for r, row in enumerate(rows))
            raise PeerError(f"The processes of the run bring tensors of different sizes, by rank {sizes}.")


ALONE = Shard()
"""A single process's: all particles."""


class _Wire:
    """The group by which a tensor travels: NCCL from GPU to GPU where there is one, else gloo from the CPU."""

    def __init__(self, tensor: Tensor) -> None:
        import torch.distributed as dist

        self._direct = tensor.is_cuda and "nccl" in dist.get_backend_config()
        self.group: ProcessGroup | None = None if self._direct else peers.control()

    def put(self, tensor: Tensor) -> Tensor:
        """Return the tensor as it is sent."""
        return (tensor if self._direct else tensor.cpu()).contiguous()


@dataclass(frozen=True)
class _Plan:
    """Which rows go where; rows are flat, ``ensemble * particles of this process + particle``, all on the CPU.

    Parameters
    ----------
    within
        Row of this process that each of its rows is copied from, and 0 for those that come from elsewhere.
    placed, taken
        Rows that come from elsewhere, and where each is among the rows received.
    leaving
        Rows to send, by process, each once.
    sent, received
        Number of rows to and from each process.
    anyone
        Whether a row changes place on any process.
    """

    within: Tensor
    placed: Tensor
    taken: Tensor
    leaving: Tensor
    sent: list[int]
    received: list[int]
    anyone: bool

    @classmethod
    def of(cls, shard: Shard, ancestors: Tensor) -> "_Plan":
        """Plan of one process; what it sends to another is sorted as that one expects it."""
        e, n = ancestors.shape
        m, rank = shard.share(n), shard.rank
        ensemble = torch.arange(e)[:, None].expand(e, n)
        source, target = ancestors // m, (torch.arange(n) // m).expand(e, n)
        row = ensemble * m + ancestors % m  # on the source
        mine = shard.block(n)
        here = (source[:, mine] == rank).flatten()
        want = (source * (e * m) + row)[:, mine].flatten()
        wanted = torch.unique(want[~here])
        leaves = (source == rank) & (target != rank)
        give = torch.unique((target * (e * m) + row)[leaves])
        return cls(
            within=torch.where(here, row[:, mine].flatten(), 0),
            placed=(~here).nonzero()[:, 0],
            taken=torch.searchsorted(wanted, want[~here]),
            leaving=give % (e * m),
            sent=torch.bincount(give // (e * m), minlength=shard.world).tolist(),
            received=torch.bincount(wanted // (e * m), minlength=shard.world).tolist(),
            anyone=bool((source != target).any()),
        )


def _as_bytes(tensor: Tensor) -> Tensor:
    """Flat bytes of a tensor: what travels whatever its dtype."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _from_bytes(data: Tensor, like: Tensor, rows: int | None = None) -> Tensor:
    """Tensor of its bytes, shaped and placed as another is, but for the number of its rows."""
    shape = like.shape if rows is None else (rows, *like.shape[1:])
    return data.contiguous().reshape(-1).view(like.dtype).reshape(shape).to(like.device)
