"""Samplers on pictures with a masked prior over decoded tokens, tuned alike: one JSON file and its tables.

    python -m invdiff.bench.decoded tune --data FOLDER --prior fashion-28-vq --out docs/decoded_28_settings.json
    python -m invdiff.bench.decoded test --data FOLDER --prior fashion-28-vq --settings docs/decoded_28_settings.json
        --out docs/decoded_28.json
    python -m invdiff.bench.decoded test ... --only "SGDD, as published" --calls 3500020 --pictures 4 --out FILE
    python -m invdiff.bench.decoded table --out docs/decoded_28.json --table docs/decoded_28_table.md

Eight tasks, two of them not linear, with noise 0.05 in [0, 1]. ``tune`` gives every contender the same number of trials
(its defaults, then seeded draws from its ranges) on the same validation pictures and a kernel or mask that no test has,
at the draws and decoder calls of the test, and keeps the settings with the best CRPS. ``test`` runs them once on the
test pictures. All have the same prior, measurements, number of draws and bound on decoder calls a picture, those of
all its particles together. Several processes with one ``--claim`` folder divide the work among them, and ``merge``
joins their files; their seconds are then no measure of speed.
"""

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

import invdiff
from invdiff.bench import rounds
from invdiff.bench.contenders import Contender
from invdiff.bench.decoded_contenders import CALLS, CONTENDERS, Decoded, run
from invdiff.bench.imaging_table import sections
from invdiff.bench.rounds import Note, Rounds, Scores, mean_and_error, merge, scores, test_batches, write
from invdiff.bench.tasks import MORE_TASKS, NOISE_STD, TASKS, VALIDATION_SEED, Group, group, pictures
from invdiff.errors import InvdiffError
from invdiff.priors.base import MaskedPrior
from invdiff.priors.loading import load_prior

DECODED_TASKS: Mapping[str, str] = {**TASKS, **MORE_TASKS}
DRAWS, TRIALS = 10, 16
"""Draws a picture, and trials a contender."""
PICTURES, TUNING_PICTURES = {28: 100, 64: 40}, 8
"""Test pictures by side, and validation pictures."""
VALIDATION_SEEDS = {28: 101, 64: VALIDATION_SEED}
"""Seed of validation by side: at 28 pixels the box of the other one is that of a test."""


def picture_shape(prior: Any) -> tuple[int, ...]:
    """Shape (c, h, w) of what a prior's tokens decode to."""
    shape: tuple[int, ...] = prior.detokeniser.out_shape
    return shape


def about(options: argparse.Namespace, prior: Any) -> dict[str, Any]:
    """Return the versions, the device and what all contenders share."""
    device = torch.device(options.device)
    return {
        "prior": getattr(prior, "name", ""),
        "prior_key": getattr(prior, "key", ""),
        "tokens": list(prior.shape),
        "vocabulary_size": prior.vocabulary_size,
        "noise_std": NOISE_STD,
        "draws": options.draws,
        "calls": options.calls,
        "precision": options.precision + (", matrix products in TF32" if options.tf32 else ""),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU",
        "versions": {
            "invdiff": invdiff.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }


def attempt(
    contender: Contender, settings: Mapping[str, Any], batch: Group, prior: MaskedPrior, options: argparse.Namespace
) -> tuple[Decoded, Scores] | str:
    """Run and score, or say why it cannot be done."""
    try:
        result = run(
            contender,
            settings,
            batch,
            prior,
            draws=options.draws,
            calls=options.calls,
            device=options.device,
            precision=options.precision,
            micro_batch=options.micro_batch,
        )
    except InvdiffError as error:
        return f"{type(error).__name__}: {error}"
    if not bool(torch.isfinite(result.draws).all()):
        return "its draws are not finite"
    return result, scores(result.draws, batch)


def cost(results: Sequence[Decoded], count: int) -> dict[str, Any]:
    """Mean cost of a picture, with its standard error; a picture's seconds are its share of its run's."""
    # A run's cost is shared evenly by its pictures.
    found = {
        key: mean_and_error(list(chain.from_iterable([getattr(r, key)] * len(r.draws) for r in results)))
        for key in ("calls", "backward", "passes", "seconds")
    }
    assert sum(len(r.draws) for r in results) == count
    return {"exact": results[0].exact} | {key: [round(v, 5) for v in pair] for key, pair in found.items()}


def _rounds(prior: MaskedPrior, options: argparse.Namespace) -> Rounds[Decoded]:
    return Rounds(
        tasks=DECODED_TASKS,
        contenders=CONTENDERS,
        attempt=lambda contender, settings, batch: attempt(contender, settings, batch, prior, options),
        cost=cost,
    )


def tune(options: argparse.Namespace, prior: MaskedPrior, note: Note) -> None:
    """Try settings on validation pictures; one row for a task and a contender."""
    side = picture_shape(prior)[-1]
    truths = pictures(options.data, side, "validation", options.pictures)
    batches = {task: group(task, truths, list(range(len(truths))), VALIDATION_SEEDS[side]) for task in DECODED_TASKS}
    rounds.tune(options, _rounds(prior, options), batches, note)


def test(options: argparse.Namespace, prior: MaskedPrior, note: Note) -> None:
    """Run tuned settings on the test pictures; one row for a task and a contender."""
    truths = pictures(options.data, picture_shape(prior)[-1], "test", options.pictures)
    batches = {task: test_batches(task, truths, options.together) for task in DECODED_TASKS}
    rounds.test(options, _rounds(prior, options), batches, note)


def table(report: Mapping[str, Any], source: str) -> str:
    """Markdown from the file alone; the best mean of a column that has a best is bold."""
    n, versions = report["draws"], ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    side, (length,) = report["side"], report["tokens"]
    head = (
        f"{report['pictures']} pictures of {side} x {side}, prior {report['prior']} ({length} tokens of "
        f"{report['vocabulary_size']}), noise {report['noise_std']}, {n} draws a picture, at most {report['calls']} "
        f"decoder calls a picture; {report['device']}, {report['precision']}; {versions}. Means with standard errors "
        f"over pictures. Coverage is that of the range of {n} draws, {(n - 1) / (n + 1):.3f} if calibrated; spread / "
        "skill and the reduced chi-square of single draws are 1 if calibrated. Calls: through the decoder and the "
        "operator, a picture, forward + backward; passes: through the network, a picture."
    )
    if report["processes"] > 1:
        head += f" Seconds are those of up to {report['processes']} processes that shared a machine."
    others = sorted({r["precision"] for r in report["rows"] if "precision" in r})
    if others:
        head += f" Rows with a dagger: {', '.join(others)}."
    text = [f"Made from `{source}` by `python -m invdiff.bench.decoded table`; not edited by hand.", "", head]

    def lead(r: Mapping[str, Any]) -> list[str]:
        calls = f"{r['calls'][0]:.0f} + {r['backward'][0]:.0f}"
        seconds = f"{r['seconds'][0]:.2f} ± {r['seconds'][1]:.2f}"
        name = r["contender"] + (" †" if "precision" in r else "")
        return [name, "yes" if r["exact"] else "no", calls, f"{r['passes'][0]:.0f}", seconds]

    titles = ["sampler", "exact in a limit", "calls", "passes", "s a picture"]
    here = {r["contender"] for r in report["rows"]}  # others have another budget, and files of their own
    text += sections(report["rows"], DECODED_TASKS, [c.name for c in CONTENDERS if c.name in here], titles, lead)
    return "\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(prog="invdiff.bench.decoded", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("tune", "test", "merge", "table"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--settings", type=Path, help="what `tune` wrote")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--parts", type=Path, nargs="*", default=[], help="files that `merge` joins")
    parser.add_argument("--processes", type=int, help="how many shared a machine, for `merge`; one a file if not given")
    parser.add_argument("--prior", default="fashion-28-vq")
    parser.add_argument("--pictures", type=int, help="100 of 28 pixels or 40 of 64, and 8 to tune")
    parser.add_argument("--together", type=int, default=8, help="pictures in one run, at most")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--calls", type=int, default=CALLS, help="decoder calls a picture, at most")
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--only", nargs="*", help="contenders")
    parser.add_argument("--tasks", nargs="*", choices=tuple(DECODED_TASKS))
    parser.add_argument("--claim", type=Path, help="empty folder that several processes share to divide the work")
    parser.add_argument("--micro-batch", type=int, default=512, help="sequences in one pass")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--tf32", action="store_true", help="matrix products in TF32, as convolutions are by default")
    options = parser.parse_args(arguments)
    if options.command == "merge":
        merge(options.out, options.parts, DECODED_TASKS, CONTENDERS, options.processes)
        return
    if options.command == "table":
        options.table.write_text(table(json.loads(options.out.read_text()), options.out.as_posix()))
        return
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    prior: Any = load_prior(options.prior)
    prior = prior.to(options.device)
    side = picture_shape(prior)[-1]
    if options.pictures is None:
        options.pictures = TUNING_PICTURES if options.command == "tune" else PICTURES[side]
    report = about(options, prior) | {"benchmark": f"decoded {options.command}", "side": side}
    report |= {"pictures": options.pictures, "processes": 1, "rows": []}
    if options.command == "tune":
        report["trials"] = options.trials

    def note(row: dict[str, Any]) -> None:
        report["rows"].append(row)
        write(options.out, report)
        print(json.dumps({k: v for k, v in row.items() if not k.startswith("each_") and k != "trials"}), flush=True)

    (tune if options.command == "tune" else test)(options, prior, note)


if __name__ == "__main__":
    main()
