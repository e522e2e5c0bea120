"""How the processes of one run agree, and how the failure of one becomes an error of all.

Before anything else travels, every process of a run sends a short row by gloo, from the CPU: whether all is well with
it, what it is about to do, and a few numbers. A process that has failed sends its row too, so that nobody waits for
what it will not send; one that has ended is found by its closed connection, at once and before a GPU waits for it, and
one that is silent after `TIMEOUT`. Nothing is pickled.
"""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from invdiff.errors import InputError, PeerError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TIMEOUT = timedelta(minutes=10)
"""Silence after which a process is taken for lost."""
KINDS = ("end", "numbers", "gather", "first", "exchange")
_NUMBERS = 6  # in a row, at most
_LETTERS = 1024  # bytes of an error's text
_FINE, _INTERRUPTED, _FAILED = range(3)
_groups: "WeakKeyDictionary[ProcessGroup, ProcessGroup | None]" = WeakKeyDictionary()
"""The gloo group beside each default group; None once a process was lost."""


def here() -> tuple[int, int]:
    """Return this process's rank, and the number of processes.

    Raises
    ------
    InputError
        If torch.distributed is not initialised.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise InputError(
            "A distributed run needs the processes of torch.distributed: start the program with "
            "`torchrun --nproc-per-node=N` and call torch.distributed.init_process_group() first."
        )
    return dist.get_rank(), dist.get_world_size()


def control() -> "ProcessGroup":
    """Return the gloo group in which the processes agree; the first call is one that all make."""
    import torch.distributed as dist

    world = dist.group.WORLD
    if world is None:
        here()  # says what is missing
    assert world is not None
    if world not in _groups:
        with answered():
            _groups[world] = cast("ProcessGroup", dist.new_group(backend="gloo", timeout=TIMEOUT))
    group = _groups[world]
    if group is None:
        raise PeerError("A process of this run was lost before; start the run again.")
    return group


@contextmanager
def answered() -> Iterator[None]:
    """Turn what torch.distributed raises when a process is gone into a PeerError."""
    try:
        yield
    except RuntimeError as error:
        _close()
        raise PeerError(
            "A process of the run has ended, or has not answered for "
            f"{TIMEOUT.total_seconds():g} s; the others stop. Look at what it said last, and start the run again. "
            f"({str(error).splitlines()[0]})"
        ) from error


def _close() -> None:
    """Close the group, so that those who wait for this process learn at once what it has learnt."""
    import torch.distributed as dist

    world = dist.group.WORLD
    group = None if world is None else _groups.get(world)
    if world is not None and group is not None:
        _groups[world] = None
        dist.destroy_process_group(group)


def meet(kind: str, numbers: Sequence[float] = (), error: BaseException | None = None) -> list[list[float]]:
    """Exchange a row with all processes.

    Parameters
    ----------
    kind
        Of `KINDS`: what this process is about to do.
    numbers
        Up to six numbers for the others.
    error
        What ended this process's work; the caller raises it after the meeting.

    Returns
    -------
        The numbers of each process, by rank.

    Raises
    ------
    PeerError
        If another process failed, is lost, or is about to do something else.
    KeyboardInterrupt
        If one was interrupted, and none failed.
    """
    world = here()[1]
    status = _FINE if error is None else _INTERRUPTED if isinstance(error, KeyboardInterrupt) else _FAILED
    if status == _FINE and _Interrupts.seen:
        status, _Interrupts.seen = _INTERRUPTED, False
    row = [float(status), float(KINDS.index(kind)), *numbers]
    table = _all_rows(torch.tensor(row + [0.0] * (2 + _NUMBERS - len(row)), dtype=torch.float64), world).tolist()
    found = [int(row[0]) for row in table]
    if max(found) == _FINE:
        kinds = [KINDS[int(row[1])] for row in table]
        if len(set(kinds)) > 1:
            raise PeerError(
                f"The processes of the run do different things: {', '.join(f'{r}: {k}' for r, k in enumerate(kinds))}. "
                "Every process makes the same calls; do not ask a part of the particles for sums over all."
            )
        return [row[2 : 2 + len(numbers)] for row in table]
    text = "" if error is None else f"{type(error).__name__}: {error}"
    letters = torch.zeros(_LETTERS, dtype=torch.uint8)
    data = torch.frombuffer(bytearray(text.encode()[:_LETTERS] or b"\0"), dtype=torch.uint8)
    letters[: len(data)] = data
    texts = _all_rows(letters, world)
    if _FAILED not in found:
        raise told(KeyboardInterrupt(f"process {found.index(_INTERRUPTED)} of {world} was interrupted"))
    first = found.index(_FAILED)
    said = bytes(texts[first].tolist()).rstrip(b"\0").decode(errors="replace")
    if status != _FAILED:
        raise PeerError(f"Process {first} of {world} (counted from 0) failed, and the others stop: {said}") from error
    return []


def _all_rows(row: Tensor, world: int) -> Tensor:
    """Rows of all processes, (world, len(row))."""
    import torch.distributed as dist

    group, rows = control(), [torch.empty_like(row) for _ in range(world)]
    with answered():
        dist.all_gather(rows, row, group=group)
    return torch.stack(rows)


def told(error: BaseException) -> BaseException:
    """Mark an error as known to all processes."""
    error.known_to_all = True  # type: ignore[attr-defined]
    return error


def is_told(error: BaseException) -> bool:
    """Whether all processes know of an error."""
    return isinstance(error, PeerError) or getattr(error, "known_to_all", False)


class _Interrupts:
    """What Ctrl-C has left to be noticed."""

    seen = False
    kept_back = False


@contextmanager
def interrupts_kept_back() -> Iterator[None]:
    """Keep a first Ctrl-C for the next meeting, since within one it would leave the others waiting."""
    ours = threading.current_thread() is threading.main_thread() and not _Interrupts.kept_back
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        if _Interrupts.seen:  # the second time, in earnest
            signal.default_int_handler(number, frame)
        _Interrupts.seen = True

    signal.signal(signal.SIGINT, note)
    _Interrupts.kept_back = True
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _Interrupts.seen = _Interrupts.kept_back = False
