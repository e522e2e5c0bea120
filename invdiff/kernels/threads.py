"""Work of compiled CPU kernels over PyTorch's number of threads.

The kernels release the interpreter's lock, so plain threads serve. numba's own thread layers end the process where two
threads enter them at once or after a fork; these do neither.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import torch


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:  # noqa: ARG001  a fork has none of its parent's threads
    return ThreadPoolExecutor(threads, thread_name_prefix="invdiff-kernel")


def share(work: Callable[..., Any], count: int, *arguments: Any, least: int = 1) -> None:
    """Call ``work(*arguments, start, stop)`` over parts of range(count), one a thread of `torch.get_num_threads()`.

    Parameters
    ----------
    work
        Compiled function that releases the interpreter's lock; parts must not write to the same place.
    count
        Number of items.
    arguments
        What every part gets.
    least
        Items below which a part is not worth a thread (some 50 us of work).
    """
    threads = max(1, min(torch.get_num_threads(), count // max(1, least)))
    if threads == 1:
        work(*arguments, 0, count)
        return
    edges = [count * i // threads for i in range(threads + 1)]
    pool = _pool(os.getpid(), threads - 1)
    parts = [pool.submit(work, *arguments, a, b) for a, b in pairwise(edges[1:])]
    work(*arguments, edges[0], edges[1])
    for part in parts:
        part.result()
