"""The processes that torchrun started for one command, each with a device of its own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from invdiff import peers
from invdiff.errors import InputError
from invdiff.parallel import ALONE, Shard
from invdiff.solve import as_device


@contextmanager
def processes(device: str | None) -> Iterator[tuple[Shard, torch.device]]:
    """Start the process group where there are several processes; give this one's shard and device.

    Parameters
    ----------
    device
        As on the command line; with several processes None, "cuda" (each takes the GPU of its local rank) or "cpu".

    Raises
    ------
    InputError
        If there are fewer GPUs than processes on this machine, or another device is asked for.
    PeerError
        If a process does not come.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE, as_device(device) or best_device()
        return
    import torch.distributed as dist

    place = _own_device(device)
    gpu = place.type == "cuda"
    if gpu:
        torch.cuda.set_device(place)
    with peers.answered():
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=peers.TIMEOUT)
    try:
        yield Shard.current(), place
    finally:
        dist.destroy_process_group()


def best_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _own_device(device: str | None) -> torch.device:
    kind = as_device(device) or best_device()
    if kind.type == "cpu":
        return kind
    if str(kind) != "cuda":
        raise InputError(
            f"With several processes each takes the GPU of its own rank; give --device cuda or cpu, not {device}."
        )
    rank, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if rank >= there:
        raise InputError(
            f"There are more processes than GPUs on this machine, {there}; start no more, or take --device cpu."
        )
    return torch.device("cuda", rank)
