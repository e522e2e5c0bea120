"""Samplers on photographs with a shipped prior, ours and deepinv's, tuned alike: one JSON file and its tables.

    python -m invdiff.bench.imaging tune --data FOLDER --out docs/imaging_settings.json
    python -m invdiff.bench.imaging test --data FOLDER --settings docs/imaging_settings.json --out docs/imaging_64.json
    python -m invdiff.bench.imaging test ... --side 256 --pictures 8 --out docs/imaging_256.json
    python -m invdiff.bench.imaging time ... --out docs/imaging_times.json
    python -m invdiff.bench.imaging table --out docs/imaging_64.json --table docs/imaging_64_table.md [--times FILE]

``tune`` gives every contender the same number of trials (its defaults, then seeded draws from its ranges) on the same
validation pictures and a kernel or mask that no test has, and keeps the settings with the best CRPS. ``test`` runs them
once on the test split. All have the same prior, precision, measurements, number of draws and bound on network
evaluations. Several processes with one ``--claim`` folder divide the work among them, and ``merge`` joins their files;
their seconds are then no measure of speed. ``time`` alone on a machine is: the second of two runs of each contender on
13 pictures, and the network alone on as many draws.
"""

import argparse
import json
import platform
import time
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

import invdiff
from invdiff.bench import rounds
from invdiff.bench.contenders import CONTENDERS, EVALUATIONS, Contender, Result, run
from invdiff.bench.imaging_table import table
from invdiff.bench.rounds import Note, Rounds, jobs, merge, read_tuned, scores, test_batches, write
from invdiff.bench.tasks import NOISE_STD, TASKS, VALIDATION_SEED, Group, group, pictures
from invdiff.errors import InvdiffError
from invdiff.posterior import PRECISIONS
from invdiff.priors.base import DiffusionPrior
from invdiff.priors.loading import load_prior

DRAWS, TUNING_DRAWS, TRIALS = 16, 4, 16
"""Draws a picture, the same for tuning, and trials a contender."""
TOGETHER = {64: 13, 256: 1}
"""Pictures in one run, by their side: a graph of all their draws must fit into memory."""


def about(options: argparse.Namespace, prior: DiffusionPrior) -> dict[str, Any]:
    """Return the versions, the device and what all contenders share."""
    device = torch.device(options.device)
    return {
        "prior": getattr(prior, "name", ""),
        "prior_key": getattr(prior, "key", ""),
        "noise_std": NOISE_STD,
        "draws": options.draws,
        "evaluations": options.evaluations,
        "count_backward": options.count_backward,
        "precision": options.precision,
        "compiled": options.compile,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU",
        "versions": {
            "invdiff": invdiff.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "deepinv": version("deepinv"),
        },
    }


def attempt(
    contender: Contender, settings: Mapping[str, Any], batch: Group, prior: DiffusionPrior, options: argparse.Namespace
) -> tuple[Result, list[dict[str, float]]] | str:
    """Run and score, or say why it cannot be done."""
    try:
        result = run(
            contender,
            settings,
            batch,
            prior,
            draws=options.draws,
            device=options.device,
            precision=options.precision,
            compiled=options.compile,
            evaluations=options.evaluations,
            count_backward=options.count_backward,
        )
    except InvdiffError as error:
        return f"{type(error).__name__}: {error}"
    if not bool(torch.isfinite(result.draws).all()):
        return "its draws are not finite"
    return result, scores(result.draws, batch)


def _rounds(prior: DiffusionPrior, options: argparse.Namespace) -> Rounds[Result]:
    return Rounds(
        tasks=TASKS,
        contenders=CONTENDERS,
        attempt=lambda contender, settings, batch: attempt(contender, settings, batch, prior, options),
        cost=lambda results, count: {
            "evaluations": results[0].evaluations,
            "backward": results[0].backward,
            "seconds_per_picture": round(sum(r.seconds for r in results) / count, 4),
        },
    )


def tune(options: argparse.Namespace, prior: DiffusionPrior, note: Note) -> None:
    """Try settings on validation pictures; one row for a task and a contender."""
    truths = pictures(options.data, 64, "validation", options.pictures)
    batches = {task: group(task, truths, list(range(len(truths))), VALIDATION_SEED) for task in TASKS}
    rounds.tune(options, _rounds(prior, options), batches, note)


def test(options: argparse.Namespace, prior: DiffusionPrior, note: Note) -> None:
    """Run tuned settings on the test pictures; one row for a task and a contender."""
    truths = pictures(options.data, options.side, "test", options.pictures)
    batches = {task: test_batches(task, truths, options.together or TOGETHER[options.side]) for task in TASKS}
    rounds.test(options, _rounds(prior, options), batches, note)


def network_seconds(prior: DiffusionPrior, rows: int, options: argparse.Namespace) -> float:
    """Median time of one pass of the network alone over so many pictures."""
    level, device = PRECISIONS[options.precision], torch.device(options.device)
    z = torch.randn(rows, *prior.shape, device=device, generator=torch.Generator(device).manual_seed(0))
    sigma = torch.full((rows,), 0.3, device=device)
    denoise = torch.compile(prior.denoise, dynamic=False) if options.compile else prior.denoise
    took = []
    for _ in range(options.repeats + 1):
        began = time.perf_counter()
        with torch.no_grad(), torch.autocast(device.type, dtype=level) if level is not None else nullcontext():
            denoise(z, sigma)
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return median(took[1:])


def clock(options: argparse.Namespace, prior: DiffusionPrior, report: dict[str, Any], note: Note) -> None:
    """Time the network, and tuned settings on the first pictures of each task with the kernel or mask of validation."""
    tuned = read_tuned(options.settings)
    truths = pictures(options.data, 64, "test", options.pictures)
    report["network_seconds"] = round(network_seconds(prior, len(truths) * options.draws, options), 6)
    batches = {task: group(task, truths, list(range(len(truths))), VALIDATION_SEED) for task in TASKS}
    for task, contender in jobs(options, _rounds(prior, options)):
        row: dict[str, Any] = {"task": task, "contender": contender.name}
        settings, batch = tuned[task, contender.name]["best"], batches[task]
        if settings is None:
            note(row | {"failed": tuned[task, contender.name]["trials"][0]["failed"]})
            continue
        attempt(contender, settings, batch, prior, options)  # compiles
        found = attempt(contender, settings, batch, prior, options)
        if isinstance(found, str):
            note(row | {"failed": found})
            continue
        result = found[0]
        ratio = result.seconds / (result.evaluations * report["network_seconds"])
        note(
            row
            | {"evaluations": result.evaluations, "backward": result.backward}
            | {"seconds_per_picture": round(result.seconds / len(truths), 4), "over_network": round(ratio, 3)}
        )


def main(arguments: list[str] | None = None) -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(prog="invdiff.bench.imaging", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("tune", "test", "time", "merge", "table"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--settings", type=Path, help="what `tune` wrote")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--times", type=Path, help="what `time` wrote, for the table's seconds")
    parser.add_argument("--parts", type=Path, nargs="*", default=[], help="files that `merge` joins")
    parser.add_argument("--prior", default="photos-64")
    parser.add_argument("--side", type=int, choices=(64, 256), default=64)
    parser.add_argument("--pictures", type=int, default=104)
    parser.add_argument("--draws", type=int, help=f"{DRAWS}, and {TUNING_DRAWS} to tune")
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS, help="network evaluations a draw, at most")
    parser.add_argument("--count-backward", action="store_true", help="backward passes are evaluations too")
    parser.add_argument("--together", type=int, help="pictures in one run of `test`; 13, and one of 256 x 256")
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--only", nargs="*", help="contenders")
    parser.add_argument("--tasks", nargs="*", choices=tuple(TASKS))
    parser.add_argument("--repeats", type=int, default=20, help="passes of the network alone that `time` takes")
    parser.add_argument("--claim", type=Path, help="empty folder that several processes share to divide the work")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args(arguments)
    if options.command == "merge":
        merge(options.out, options.parts, TASKS, CONTENDERS)
        return
    if options.command == "table":
        times = json.loads(options.times.read_text()) if options.times else None
        options.table.write_text(table(json.loads(options.out.read_text()), options.out.as_posix(), times))
        return
    if options.draws is None:
        options.draws = TUNING_DRAWS if options.command == "tune" else DRAWS
    prior: Any = load_prior(options.prior)
    if options.side != prior.shape[-1]:
        prior = prior.at((3, options.side, options.side))
    prior = prior.to(options.device)
    if options.compile:
        # As `Posterior` has it, so that one compiled network serves all contenders.
        from torch._functorch import config

        config.donated_buffer = False
    if options.precision != "float32" and torch.device(options.device).type == "cuda":
        prior = prior.to(memory_format=torch.channels_last)  # as `Posterior` has it; for all contenders alike
    if options.command in ("tune", "time"):
        options.pictures = min(options.pictures, TOGETHER[64])
    report = about(options, prior) | {"benchmark": f"imaging {options.command}", "side": options.side}
    report |= {"pictures": options.pictures, "processes": 1, "rows": []}
    if options.command == "tune":
        report["trials"] = options.trials

    def note(row: dict[str, Any]) -> None:
        report["rows"].append(row)
        write(options.out, report)
        print(json.dumps({k: v for k, v in row.items() if not k.startswith("each_") and k != "trials"}), flush=True)

    if options.command == "time":
        clock(options, prior, report, note)
    else:
        (tune if options.command == "tune" else test)(options, prior, note)


if __name__ == "__main__":
    main()
