"""Cost of one large ensemble on GPUs: seconds beside the bare network's, peak memory, and the gain of more processes.

    python -m invdiff.bench.ensembles --out one.json --table one.md --device cuda --precision bfloat16 --compile
    torchrun --nproc-per-node=2 -m invdiff.bench.ensembles --out two.json --device cuda --precision bfloat16 --compile
    python -m invdiff.bench.ensembles --merge one.json two.json --out both.json --table both.md

Box inpainting of a smooth picture by ``TransportLangevin`` without weights, for several numbers of particles. The
second of two runs is timed, between barriers; the network alone runs as often, on a process's share, in the same
batches.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import invdiff
from invdiff import peers
from invdiff.bench.rounds import join, write
from invdiff.likelihoods import Gaussian
from invdiff.operators import Inpainting, box_mask
from invdiff.parallel import ALONE, Shard
from invdiff.posterior import PRECISIONS
from invdiff.priors.loading import load_prior
from invdiff.problem import Problem
from invdiff.samplers import TransportLangevin

NOISE_STD, SEED = 0.05, 0


@contextmanager
def processes(kind: str) -> Iterator[tuple[Shard, torch.device]]:
    """Give this process's shard and device; with torchrun, each process has the GPU of its local rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE, torch.device(kind)
        return
    place = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=peers.TIMEOUT)
    try:
        yield Shard.current(), place
    finally:
        torch.distributed.destroy_process_group()


def settle(device: torch.device, shard: Shard) -> float:
    """Wait for the device and for all processes; give the time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if shard.world > 1:
        torch.distributed.barrier()
    return time.perf_counter()


def network_seconds(prior: Any, passes: int, rows: int, batch: int, options: argparse.Namespace, shard: Shard) -> float:
    """Seconds of so many passes of the network alone over a process's rows, and nothing else."""
    device, level = options.place, PRECISIONS[options.precision]
    denoise = torch.compile(prior.denoise, dynamic=False) if options.compile else prior.denoise
    z = torch.randn(rows, *prior.shape, device=device, generator=torch.Generator(device).manual_seed(SEED))
    sigma = torch.full((rows,), 0.3, device=device)
    autocast = torch.autocast(device.type, dtype=level) if level is not None else nullcontext()
    with torch.no_grad(), autocast:
        for part in torch.split(z, batch):
            denoise(part, sigma[: len(part)])
        began = settle(device, shard)
        for _ in range(passes):
            for part in torch.split(z, batch):
                denoise(part, sigma[: len(part)])
        return settle(device, shard) - began


def measure(particles: int, options: argparse.Namespace, prior: Any, shard: Shard) -> dict[str, Any]:
    """Time one ensemble of so many particles."""
    device, share = options.place, shard.share(particles)
    side = prior.shape[-1]
    operator = Inpainting(box_mask((side, side), side // 2, seed=SEED), prior.shape)
    generator = torch.Generator().manual_seed(SEED)
    truth = torch.rand(1, prior.shape[0], 4, 4, generator=generator)
    truth = torch.nn.functional.interpolate(truth, size=(side, side), mode="bicubic", align_corners=False).clamp(0, 1)
    clean = operator(truth)[0]
    data = clean + NOISE_STD * torch.randn(clean.shape, generator=generator)
    problem = Problem(Gaussian(operator, data, NOISE_STD))
    batch = min(options.batch, share)
    took, memory, passes = 0.0, 0.0, 0
    for _ in range(2):  # the first compiles
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = settle(device, shard)
        solution = invdiff.solve(
            problem,
            prior,
            TransportLangevin(steps=options.steps),
            draws=particles,
            seed=SEED,
            device=device,
            micro_batch=batch,
            precision=options.precision,
            compile=options.compile,
            distributed=shard.world > 1,
        )
        took = settle(device, shard) - began
        passes = round(solution.about["evaluations_per_draw"])
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device) / 2**30
    bare = network_seconds(prior, passes, share, batch, options, shard)
    return {
        "particles": particles,
        "processes": shard.world,
        "evaluations": passes,
        "seconds": round(took, 4),
        "network_seconds": round(bare, 4),
        "over_network": round(took / bare, 4),
        "peak_gibibytes": round(memory, 3),
    }


def table(report: Mapping[str, Any], source: str) -> str:
    """Markdown from the file alone."""
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    compiled = ", compiled" if report["compiled"] else ""
    text = [f"Made from `{source}` by `python -m invdiff.bench.ensembles`; not edited by hand.", ""]
    text += [f"Prior {report['prior']}; {report['device']}, {report['precision']}{compiled}; {versions}.", ""]
    text += ["| particles | processes | passes | s | s of the network alone | ratio | peak memory, GiB |"]
    text += ["|" + " ---: |" * 7]
    text += [
        f"| {r['particles']} | {r['processes']} | {r['evaluations']} | {r['seconds']:.2f} | "
        f"{r['network_seconds']:.2f} | {r['over_network']:.3f} | {r['peak_gibibytes']:.2f} |"
        for r in report["rows"]
    ]
    return "\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="invdiff.bench.ensembles", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, help="Markdown made from the file")
    parser.add_argument("--prior", default="photos-64")
    parser.add_argument("--particles", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--steps", type=int, default=TransportLangevin().steps)
    parser.add_argument("--batch", type=int, default=1024, help="rows of one pass of the network, at most")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=tuple(PRECISIONS))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--merge", type=Path, nargs="+", help="files of several runs to join in --out; runs nothing")
    options = parser.parse_args(arguments)
    if options.merge:
        joined = join(options.merge, ("rows",))
        write(options.out, joined)
        if options.table is not None:
            options.table.write_text(table(joined, options.out.as_posix()))
        return
    with processes(options.device) as (shard, place):
        options.place = place
        prior: Any = load_prior(options.prior).to(place)
        gpu = place.type == "cuda"
        if gpu and options.precision != "float32":
            prior = prior.to(memory_format=torch.channels_last)  # as `Posterior` has it
        report: dict[str, Any] = {
            "benchmark": "ensembles",
            "prior": options.prior,
            "prior_key": prior.key,
            "precision": options.precision,
            "compiled": options.compile,
            "batch": options.batch,
            "device": torch.cuda.get_device_name(place) if gpu else platform.machine() + " CPU",
            "versions": {
                "invdiff": invdiff.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            "rows": [],
        }
        for particles in options.particles:
            row = measure(particles, options, prior, shard)
            report["rows"].append(row)
            if shard.rank == 0:
                print(json.dumps(row), flush=True)
                write(options.out, report)
        if shard.rank == 0 and options.table is not None:
            options.table.write_text(table(report, options.out.as_posix()))


if __name__ == "__main__":
    main()
