"""The solver of Burgers' equation: error and time by grid, precision and batch, on random cases of WDNO's setting.

    python -m invdiff.bench.burgers_solver --out burgers_solver.json [--device cuda] [--keep converged.safetensors]
        [--refine 1 2 3 4] [--dtypes float32 float64] [--batches 1 64 4096] [--cases 64] [--deadline SECONDS]
    python -m invdiff.bench.burgers_solver --report cpu.json h100.json [--table FILE.md] [--plot FILE.svg]

The error of a case is the relative L2 distance of its cells' averages from a solution with many cells in float64; a
second one, with fewer, shows that the first has converged. Both can be kept in a file, since they take longest. Times
are of whole trajectories with synchronised ends, medians in seconds a trajectory and unit of time. Beside them runs a
plain loop of explicit Euler steps on the grid that the published data were made on. The file is written after every
row, so what a deadline cuts off is not lost.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import invdiff
from invdiff import kernels
from invdiff.bench.burgers_solver_table import plot, table
from invdiff.bench.rounds import write
from invdiff.errors import InputError
from invdiff.pde.burgers_data import BurgersSetting, burgers_cases

SETTING, SEED = BurgersSetting.named("wdno"), 1
LEVELS = (16, 12)
"""Cells in a control cell of the converged solution, and of the one that it is held to."""
REFINE = {"cpu": (1, 2, 3, 4, 6, 8), "cuda": (1, 2, 3, 4)}
BATCHES = {"cpu": (1, 16, 64), "cuda": (1, 16, 64, 512, 4096, 16384)}
CALLS = ("forward", "forward and adjoint")
POINTS, RATE = 1920, 76800
"""Grid points and steps in a unit of time with which WDNO (Hu et al. 2025) made its data."""
PUBLISHED = {
    "seconds": 0.695,
    "source": "WDNO's own code (Hu et al. 2025) on one NVIDIA H100 80GB HBM3 with torch 2.11, 512 trajectories at "
    "once, 4.64 ms a step; measured apart, not by this benchmark",
}


def euler(
    u: Tensor, f: Tensor, window: float, steps: int, *, nu: float, points: int = POINTS, rate: int = RATE
) -> Tensor:
    """Take explicit Euler steps of central differences of second order, in plain PyTorch.

    Parameters
    ----------
    u, f
        State (n, cells) and forcing (n, windows, cells), held in each cell.
    window
        Length of a window of forcing.
    steps
        Their number.
    nu, points, rate
        Viscosity, grid points, of which there are a whole number in a cell, and steps in a unit of time.
    """
    repeat, dx = points // u.shape[1], 1.0 / points
    u = u.repeat_interleave(repeat, 1)
    for k in range(steps):
        if k == 0 or int(k / rate / window) != int((k - 1) / rate / window):
            forcing = f[:, int(k / rate / window)].repeat_interleave(repeat, 1)
        p = torch.cat((-u[:, :1], u, -u[:, -1:]), 1)
        left, right = p[:, :-2], p[:, 2:]
        advection = (right.square() - left.square()) / (4.0 * dx)
        u = u + (nu * (right - 2.0 * u + left) / dx**2 - advection + forcing) / rate
    return u


def converged(cases: int, device: torch.device, keep: Path | None) -> tuple[dict[int, Tensor], str]:
    """Solutions of `LEVELS` in float64 on the CPU, and where they were made; those in the file are not solved again.

    Raises
    ------
    InputError
        If the file is of other cases.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    told = {"setting": repr(SETTING), "seed": str(SEED), "cases": str(cases)}
    found, where = {}, _name(device)
    if keep is not None and keep.exists():
        with safe_open(keep, "pt") as file:
            said = dict(file.metadata() or {})
            odd = [key for key, value in told.items() if said.get(key) != value]
            if odd:
                raise InputError(
                    f"{keep} holds solutions of another {' and '.join(odd)}; name another file, or give --cases "
                    f"{said.get('cases')} if that alone differs."
                )
            found = {r: file.get_tensor(f"refine_{r}") for r in LEVELS if f"refine_{r}" in file.keys()}  # noqa: SIM118
            where = said["device"]
    if set(found) != set(LEVELS):
        u, f = (t.to(device) for t in burgers_cases(SETTING, range(cases), seed=SEED))
        with torch.no_grad():
            found = {r: SETTING.solver(r)(u, f).cpu() for r in LEVELS}
        where = _name(device)
        if keep is not None:
            save_file({f"refine_{r}": t for r, t in found.items()}, keep, metadata={**told, "device": where})
    return found, where


def distance(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Worst and median relative L2 distance over cases (n, states, points), over all times and at the end."""
    result = {}
    for key, a, b in (("", found, truth), ("_end", found[:, -1:], truth[:, -1:])):
        each = (a.cpu().double() - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)
        result["worst" + key], result["median" + key] = (
            float(f"{float(v):.4g}") for v in (each.max(), each.quantile(0.5))
        )
    return result


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def _times(call: Callable[[], Any], device: torch.device, seconds: float) -> list[float]:
    """Seconds of calls after a first one that does not count; three at least, and 50 at most."""
    times: list[float] = []
    for i in range(51):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i:
            times.append(time.perf_counter() - began)
        if len(times) >= 3 and sum(times) > seconds:
            break
    return times


def _call(kind: str, refine: int, u: Tensor, f: Tensor) -> Callable[[], Any]:
    solver = SETTING.solver(refine)
    if kind == "forward":
        return torch.no_grad()(lambda: solver(u, f))
    a, b = u.clone().requires_grad_(), f.clone().requires_grad_()
    bar = torch.ones(len(u), SETTING.windows + 1, SETTING.points, dtype=u.dtype, device=u.device)
    return lambda: torch.autograd.grad(solver(a, b), (a, b), bar)


def _timed(report: dict[str, Any], series: tuple[str, str, int], options: argparse.Namespace, end: float) -> None:
    """Time one kind of call, precision and grid over batches; larger ones end where one took too long."""
    kind, dtype, refine = series
    device, slow = torch.device(options.device), False
    u, f = (t.to(device, getattr(torch, dtype)) for t in burgers_cases(SETTING, range(options.cases), seed=SEED))
    for batch in options.batches:
        key = f"{kind}, {dtype}, refine={refine}, batch {batch}"
        if slow or time.monotonic() > end:
            report["left_out"].append(f"{key}: {'too slow' if slow else 'the deadline passed'}")
            continue
        i = torch.arange(batch, device=device) % options.cases
        try:
            times = _times(_call(kind, refine, u[i], f[i]), device, options.seconds)
        except torch.cuda.OutOfMemoryError:
            report["left_out"].append(f"{key}: too large for the memory")
            continue
        each, least = (float(f"{t / batch / SETTING.duration:.4g}") for t in (median(times), min(times)))
        row = {"what": "time", "call": kind, "dtype": dtype, "refine": refine, "batch": batch}
        report["rows"].append({**row, "seconds": each, "least": least, "calls": len(times)})
        slow = median(times) > options.longest
        write(options.out, report)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure errors, then times, until the deadline; returns the report and writes it as it grows.

    Raises
    ------
    InputError
        If the device has no compiled kernel, or `options.keep` is of other cases.
    """
    device, end = torch.device(options.device), time.monotonic() + options.deadline
    kernel = kernels.version("burgers_trajectory", torch.empty(0, device=device))
    if kernel == "reference":
        raise InputError(f"No compiled kernel runs on {device}; it needs Triton and a place in invdiff.kernels.ON_GPU.")
    truths, where = converged(options.cases, device, options.keep)
    truth = truths[LEVELS[0]]
    report: dict[str, Any] = {
        "benchmark": "burgers-solver",
        "cases": options.cases,
        "seed": SEED,
        "device": _name(device),
        "threads": torch.get_num_threads(),
        "versions": {"invdiff": invdiff.__version__, "python": platform.python_version(), "torch": torch.__version__}
        | {p: version(p) for p in ("numba", "triton") if find_spec(p)},
        "points": SETTING.points,
        "converged": {"levels": LEVELS, "device": where, **distance(truths[LEVELS[1]], truth)},
        "published": PUBLISHED,
        "left_out": [],
        "rows": [],
    }
    cases = burgers_cases(SETTING, range(options.cases), seed=SEED)
    for refine in options.refine:
        for dtype in options.dtypes:
            if time.monotonic() > end:
                report["left_out"].append(f"error, {dtype}, refine={refine}: the deadline passed")
                continue
            u, f = (t.to(device, getattr(torch, dtype)) for t in cases)
            with torch.no_grad():
                error = distance(SETTING.solver(refine)(u, f), truth)
            report["rows"].append({"what": "error", "dtype": dtype, "refine": refine, **error})
            write(options.out, report)
    batch = 512 if device.type == "cuda" else 64
    u, f = (t.to(device, torch.float32)[torch.arange(batch) % options.cases] for t in cases)
    window = SETTING.duration / SETTING.windows
    times = _times(lambda: euler(u, f, window, options.steps, nu=SETTING.viscosity), device, options.seconds)
    each = float(f"{median(times) / options.steps * RATE / batch:.4g}")
    report["rows"].append(
        {"what": "euler", "dtype": "float32", "batch": batch, "steps": options.steps, "seconds": each}
    )
    for kind in CALLS:
        for dtype in options.dtypes:
            for refine in options.refine:
                _timed(report, (kind, dtype, refine), options, end)
                print(f"{kind}, {dtype}, refine={refine}", flush=True)
    write(options.out, report)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, or draw what its files hold."""
    parser = argparse.ArgumentParser(prog="invdiff.bench.burgers_solver", description=(__doc__ or "").splitlines()[0])
    to = parser.add_mutually_exclusive_group(required=True)
    to.add_argument("--out", type=Path, help="file to write; runs the benchmark")
    to.add_argument("--report", type=Path, nargs="+", help="files of runs to draw; runs nothing")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--refine", type=int, nargs="+", help=f"cells in a control cell; {REFINE} if not given")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "float64"), default=["float32", "float64"])
    parser.add_argument("--batches", type=int, nargs="+", help=f"{BATCHES} if not given")
    parser.add_argument("--cases", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300, help="Euler steps that are timed")
    parser.add_argument("--keep", type=Path, help="safetensors file of the converged solutions, read if it is there")
    parser.add_argument("--seconds", type=float, default=0.2, help="time for one row")
    parser.add_argument(
        "--longest", type=float, default=0.5, help="seconds of a call; no larger batch follows a longer"
    )
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds; no new row begins after it")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--table", type=Path, help="write tables in Markdown")
    parser.add_argument("--plot", type=Path, help="draw error against time")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.refine = options.refine or list(REFINE[options.device])
    options.batches = options.batches or list(BATCHES[options.device])
    files = options.report or [options.out]
    reports = [json.loads(p.read_text()) for p in files] if options.report else [run(options)]
    if options.table:
        options.table.write_text(table(reports, [p.as_posix() for p in files]))
    if options.plot:
        plot(reports, options.plot)


if __name__ == "__main__":
    main()
