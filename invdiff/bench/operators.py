"""Times of measurement operators: forward, adjoint, likelihood's gradient and proximal step, libraries interleaved.

    python -m invdiff.bench.operators --out operators.json [--device cuda] [--batches 1 16 256] [--sizes 64 256]
        [--rows blur inpainting] [--calls forward adjoint] [--deadline SECONDS] [--table FILE.md] [--plot FILE.png]

Times are medians and least values in microseconds. Every call reads another buffer of a ring that is larger than the
GPU's second-level cache. On CUDA a call is timed with events behind a short spin of the device, so that the host's own
time does not count unless it is longer than the work. A copy of the same batch, timed beside them, tells the memory's
speed. The file is written after every row, so what a deadline cuts off is not lost.
"""

import argparse
import json
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from invdiff.bench.operators_rows import CALLS, Call, names, row
from invdiff.bench.operators_table import plot, table
from invdiff.bench.rounds import join
from invdiff.errors import InvdiffError

_MODULES = {"pywavelets": "pywt"}
SIZES, BATCHES = [64, 128, 256, 512], [1, 16, 256]
_RING = 3
_MARGIN = 12
"""Copies of a batch that the slowest way may need at once."""


def interleave(
    calls: Mapping[str, Call], like: Mapping[str, Tensor], device: torch.device, seconds: float
) -> dict[str, tuple[float, float]]:
    """Median and least time of each call in microseconds, one call of each in turn.

    Parameters
    ----------
    calls
        What is timed.
    like
        A batch for each call.
    device
        Where they lie.
    seconds
        Time for all together; each is called three times at least, and 200 times at most.
    """
    cuda = device.type == "cuda"
    ring = max(_RING, 2 + 100_000_000 // max(1, 4 * min(t.numel() for t in like.values()))) if cuda else _RING
    generator = torch.Generator(device).manual_seed(0)
    buffers = {
        k: [_normal(like[k].shape, device, generator, like[k].dtype) for _ in range(min(ring, 16))] for k in calls
    }
    for k, call in calls.items():
        call(buffers[k][0])
    times: dict[str, list[float]] = {k: [] for k in calls}
    end = time.perf_counter() + seconds
    for i in range(200):
        if i >= 3 and time.perf_counter() > end:
            break
        for k, call in calls.items():
            times[k].append(_time(call, buffers[k][i % len(buffers[k])], cuda=cuda))
    return {k: (round(median(v), 1), round(min(v), 1)) for k, v in times.items()}


def _normal(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def _time(call: Call, b: Tensor, *, cuda: bool) -> float:
    if not cuda:
        t = time.perf_counter()
        call(b)
        return 1e6 * (time.perf_counter() - t)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(400_000)  # type: ignore[no-untyped-call]
    start.record()
    call(b)
    end.record()
    torch.cuda.synchronize()
    return 1e3 * float(start.elapsed_time(end))


def _cells(name: str, size: int, batch: int, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time one row at one size and batch: a cell for each kind of call."""
    shape, entries = row(name, size, device)
    x = _normal((batch, *shape), device, torch.Generator(device).manual_seed(0))
    cells = []
    for kind in CALLS:
        calls = {k: e.calls[kind] for k, e in entries.items() if kind in e.calls}
        if kind not in options.calls or "invdiff" not in calls:
            continue
        like = {k: entries[k].calls["forward"](x) if kind == "adjoint" else x for k in calls}
        copy = torch.empty_like(x)
        times = interleave({**calls, "copy": copy.copy_}, {**like, "copy": x}, device, options.seconds)
        cells.append(
            {
                "row": name,
                "size": size,
                "batch": batch,
                "call": kind,
                "median_us": {k: v[0] for k, v in times.items()},
                "least_us": {k: v[1] for k, v in times.items()},
                "how": {k: entries[k].how for k in calls},
            }
        )
    return cells


def _memory(device: torch.device) -> float:
    """Bytes that batches may take."""
    if device.type == "cuda":
        return 0.8 * torch.cuda.get_device_properties(device).total_memory
    return 4e9


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Time all chosen rows until the deadline; returns the report and writes it as it grows."""
    device = torch.device(options.device)
    end = time.monotonic() + options.deadline
    report: dict[str, Any] = {
        "benchmark": "operators",
        "dtype": "float32",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {
            p: version(p) for p in ("deepinv", "triton", "numba", "ptwt", "pywavelets") if find_spec(_MODULES.get(p, p))
        },
        "cells": [],
        "left_out": [],
    }
    wanted = [n for n in names() if not options.rows or any(r.lower() in n.lower() for r in options.rows)]
    with torch.no_grad():
        for size in options.sizes or SIZES:
            for batch in options.batches or BATCHES:
                for name in wanted:
                    key = f"{name}, {size}, batch {batch}"
                    if time.monotonic() > end:
                        report["left_out"].append(f"{key}: the deadline passed")
                    elif _MARGIN * 12 * batch * size**2 > _memory(device):
                        report["left_out"].append(f"{key}: too large for the memory")
                    else:
                        try:
                            report["cells"] += _cells(name, size, batch, options, device)
                        except (InvdiffError, torch.cuda.OutOfMemoryError) as error:
                            report["left_out"].append(f"{key}: {error}")
                        print(key, flush=True)
                    options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and write its files."""
    parser = argparse.ArgumentParser(prog="invdiff.bench.operators", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+", help=f"{BATCHES} if not given")
    parser.add_argument("--sizes", type=int, nargs="+", help=f"{SIZES} if not given")
    parser.add_argument("--rows", nargs="+", default=[], metavar="PART", help="rows whose name holds one of these")
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=list(CALLS))
    parser.add_argument("--seconds", type=float, default=0.5, help="time for one cell of the table")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds; no new cell begins after it")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--table", type=Path, default=None, help="write a table in Markdown")
    parser.add_argument("--plot", type=Path, default=None, help="draw time against size")
    parser.add_argument("--merge", type=Path, nargs="+", help="files of several runs to join in --out; runs nothing")
    parser.add_argument("--report", action="store_true", help="only draw what --out holds already, of these sizes")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.merge:
        report = join(options.merge, ("cells", "left_out"))
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    else:
        report = json.loads(options.out.read_text()) if options.report else run(options)
    if options.table:
        cells = [c for c in report["cells"] if c["size"] in (options.sizes or [c["size"]])]
        cells = [c for c in cells if c["batch"] in (options.batches or [c["batch"]])]
        options.table.write_text(table(report | {"cells": cells}))
    if options.plot:
        plot(report, options.plot)


if __name__ == "__main__":
    main()
