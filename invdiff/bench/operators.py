"""Times of measurement operators and their adjoints, ours and deepinv's interleaved, as one JSON file.

    python -m invdiff.bench.operators --out operators.json [--device cuda] [--quick]

Times are medians in microseconds. Every call reads another buffer of a ring that is larger than the GPU's second-level
cache. On CUDA a call is timed with events behind a short spin of the device, so that the host's own time does not count
unless it is longer than the work.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from invdiff.operators import Blur, Downsampling, Inpainting, gaussian_kernel, motion_kernel, random_mask
from invdiff.operators.base import LinearOperator

Call = Callable[[Tensor], Any]
PROX = "proximal step, motion blur 61, circular"


def _prox(A: LinearOperator, z: Tensor) -> Tensor:
    return A.prox(z, z, 1.0)


def rows(shape: tuple[int, int, int], device: torch.device) -> dict[str, dict[str, tuple[Call, Call, str]]]:
    """Build every row: for each library the operator, its adjoint, and how it computes."""
    motion, gaussian = motion_kernel(61), gaussian_kernel(23, 3.0)
    mask = random_mask(shape[1:], 0.5)
    ours: dict[str, LinearOperator] = {
        "motion blur 61, circular": Blur(motion, shape, "circular"),
        "motion blur 61, valid": Blur(motion, shape, "valid"),
        "motion blur 61, reflect": Blur(motion, shape, "reflect"),
        "Gaussian blur 23, reflect": Blur(gaussian, shape, "reflect"),
        "inpainting": Inpainting(mask, shape),
        "down-sampling 4, bicubic": Downsampling(shape, 4),
    }
    table: dict[str, dict[str, tuple[Call, Call, str]]] = {}
    for name, operator in ours.items():
        A = operator.to(device)
        note = A.chosen_method(device) if isinstance(A, Blur) else ""
        table[name] = {"invdiff": (A, A.adjoint, note)}
        if isinstance(A, Blur) and A.boundary == "circular":
            table[PROX] = {"invdiff": (partial(_prox, A), A.adjoint, "closed form")}
    if find_spec("deepinv") is None:
        return table
    from deepinv import physics

    def add(row: str, label: str, p: Any, note: str) -> None:
        p = p.to(device)
        table[row][label] = (p.A, p.A_adjoint, note)

    k, g = motion.float()[None, None], gaussian.float()[None, None]
    for boundary in ("circular", "valid", "reflect"):
        row = f"motion blur 61, {boundary}"
        add(row, "deepinv", physics.Blur(filter=k, padding=boundary), "its default")
        if boundary != "reflect":
            add(row, "deepinv (fft)", physics.Blur(filter=k, padding=boundary, use_fft=True), "use_fft=True")
    fourier = physics.BlurFFT(img_size=shape, filter=k).to(device)
    table["motion blur 61, circular"]["deepinv (BlurFFT)"] = (fourier.A, fourier.A_adjoint, "BlurFFT")
    table[PROX]["deepinv"] = (lambda z: fourier.prox_l2(z, z, 1.0), fourier.A_adjoint, "BlurFFT")
    add("Gaussian blur 23, reflect", "deepinv", physics.Blur(filter=g, padding="reflect"), "its default")
    add("inpainting", "deepinv", physics.Inpainting(img_size=shape, mask=mask.float()), "same-shape output")
    down = physics.Downsampling(img_size=shape, filter="bicubic", factor=4, padding="circular")
    add("down-sampling 4, bicubic", "deepinv", down, "circular boundary")
    return table


def interleave(calls: dict[str, Call], like: dict[str, Tensor], repeats: int, device: torch.device) -> dict[str, float]:
    """Median time of each call in microseconds, one call of each in turn."""
    ring, cuda = 6, device.type == "cuda"
    buffers = {k: [torch.randn_like(like[k]) for _ in range(ring)] for k in calls}
    for k, call in calls.items():
        for b in buffers[k][:3]:
            call(b)
    times: dict[str, list[float]] = {k: [] for k in calls}
    for i in range(repeats):
        for k, call in calls.items():
            b = buffers[k][i % ring]
            if cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                torch.cuda._sleep(400_000)  # type: ignore[no-untyped-call]
                start.record()
                call(b)
                end.record()
                torch.cuda.synchronize()
                times[k].append(1e3 * start.elapsed_time(end))
            else:
                t = time.perf_counter()
                call(b)
                times[k].append(1e6 * (time.perf_counter() - t))
    return {k: round(median(v), 1) for k, v in times.items()}


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and write the file."""
    parser = argparse.ArgumentParser(prog="invdiff.bench.operators", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="batch 2, few repeats")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    batch, shape = (2 if options.quick else 16), (3, 256, 256)
    repeats = (3 if options.quick else 11) * (10 if device.type == "cuda" else 1)
    results = {}
    with torch.no_grad():
        for row, entries in rows(shape, device).items():
            x = {k: torch.randn(batch, *shape, device=device) for k in entries}
            y = {k: torch.empty_like(e[0](x[k])) for k, e in entries.items()}
            forward = interleave({k: e[0] for k, e in entries.items()}, x, repeats, device)
            only_forward = row == PROX
            adjoint = {} if only_forward else interleave({k: e[1] for k, e in entries.items()}, y, repeats, device)
            results[row] = {
                k: {"forward_us": forward[k], "adjoint_us": adjoint.get(k), "how": e[2]} for k, e in entries.items()
            }
            print(row, json.dumps(results[row]))
    report = {
        "benchmark": "operators",
        "input": [batch, *shape],
        "dtype": "float32",
        "repeats": repeats,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **({"deepinv": version("deepinv")} if find_spec("deepinv") else {}),
        },
        "results": results,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
