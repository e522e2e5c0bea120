"""Rounds of a benchmark on pictures: trials on validation pictures, one run on the test pictures, and their files.

Every contender has the same number of trials, its defaults first; the settings with the best CRPS are kept, and run
once on the test pictures. Processes that share a ``--claim`` folder divide the work, and `merge` joins their files.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from invdiff import metrics
from invdiff.bench.contenders import Contender, trial
from invdiff.bench.tasks import Group, group, tests
from invdiff.errors import InputError

FIGURES = ("psnr_mean", "psnr_draw", "ssim_mean", "crps", "coverage", "spread_skill", "chi_square")
Scores = list[dict[str, float]]
Note = Callable[[dict[str, Any]], None]
R = TypeVar("R")
"""What a run gives; its scores come beside it."""


@dataclass(frozen=True, kw_only=True)
class Rounds(Generic[R]):
    """What tells one benchmark from another.

    Parameters
    ----------
    tasks, contenders
        Names and titles of the tasks, and who takes part.
    attempt
        (contender, settings, group) -> result and scores by picture, or why there are none.
    cost
        (results of a task, pictures) -> what a row says of cost.
    """

    tasks: Mapping[str, str]
    contenders: Sequence[Contender]
    attempt: Callable[[Contender, Mapping[str, Any], Group], tuple[R, Scores] | str]
    cost: Callable[[Sequence[R], int], dict[str, Any]]


def scores(draws: Tensor, batch: Group) -> Scores:
    """Scores of each picture from its draws, (pictures, draws, c, h, w).

    Coverage is that of the draws' range, (n - 1) / (n + 1) for n exact draws.
    """
    rows = []
    for problem, own, truth in zip(batch.problems, draws.float().cpu(), batch.truths, strict=True):
        likelihood: Any = problem.likelihood
        found = metrics.score(own, truth)
        n = len(own)
        found["coverage"] = metrics.coverage(own, truth, (n - 1) / (n + 1))
        found["chi_square"] = float(likelihood.to("cpu").deviance(own).mean()) / likelihood.measurements
        rows.append({key: found[key] for key in FIGURES})
    return rows


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over pictures."""
    t = torch.tensor(values, dtype=torch.float64)
    return float(t.mean()), float(t.std() / sqrt(len(t))) if len(t) > 1 else float("nan")


def jobs(options: argparse.Namespace, rounds: Rounds[Any]) -> Iterator[tuple[str, Contender]]:
    """Pairs of task and contender to work on, the long ones first; with ``--claim`` those that no one else took."""
    for contender in sorted(rounds.contenders, key=lambda c: not c.gradient):
        for task in rounds.tasks:
            wanted = not options.only or contender.name in options.only
            if not wanted or (options.tasks and task not in options.tasks):
                continue
            if options.claim is not None:
                try:
                    (options.claim / f"{task} {contender.name}").touch(exist_ok=False)
                except FileExistsError:
                    continue
            yield task, contender


def tune(options: argparse.Namespace, rounds: Rounds[R], batches: Mapping[str, Group], note: Note) -> None:
    """Try settings on validation pictures; one row for a task and a contender."""
    for task, contender in jobs(options, rounds):
        trials: list[dict[str, Any]] = []
        for k in range(options.trials):
            settings, began = trial(contender, k), time.perf_counter()
            if any(t["settings"] == settings for t in trials):
                continue  # a sampler without settings has one trial
            found = rounds.attempt(contender, settings, batches[task])
            row: dict[str, Any] = {"settings": settings}
            if isinstance(found, str):
                row["failed"] = found
            else:
                crps, _ = mean_and_error([s["crps"] for s in found[1]])
                psnr, _ = mean_and_error([s["psnr_mean"] for s in found[1]])
                row |= {"crps": round(crps, 6), "psnr_mean": round(psnr, 3)}
            trials.append(row | {"seconds": round(time.perf_counter() - began, 2)})
            if "failed" in row and k == 0 and "CapabilityError" in row["failed"]:
                break  # no setting makes it able
        done = [t for t in trials if "crps" in t]
        best = min(done, key=lambda t: t["crps"]) if done else None
        note({"task": task, "contender": contender.name, "best": best and best["settings"], "trials": trials})


def test_batches(task: str, truths: Tensor, together: int) -> list[Group]:
    """All test pictures of a task, by operator, and no more of them in one run than ``together``."""
    return [
        group(task, truths, list(g.indices[i : i + together]), g.seed)
        for g in tests(task, truths)
        for i in range(0, len(g.indices), together)
    ]


def read_tuned(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows that `tune` wrote, by task and contender."""
    return {(r["task"], r["contender"]): r for r in json.loads(path.read_text())["rows"]}


def test(options: argparse.Namespace, rounds: Rounds[R], batches: Mapping[str, Sequence[Group]], note: Note) -> None:
    """Run tuned settings on the test pictures; one row for a task and a contender."""
    tuned = read_tuned(options.settings)
    for task, contender in jobs(options, rounds):
        row: dict[str, Any] = {"task": task, "contender": contender.name, "library": contender.library}
        settings = tuned[task, contender.name]["best"]
        if settings is None:
            note(row | {"failed": tuned[task, contender.name]["trials"][0]["failed"]})
            continue
        rows: dict[int, dict[str, float]] = {}
        cost: list[R] = []
        failed = ""
        for batch in batches[task]:
            found = rounds.attempt(contender, settings, batch)
            if isinstance(found, str):
                failed = found
                break
            cost.append(found[0])
            rows |= dict(zip(batch.indices, found[1], strict=True))
        if failed:
            note(row | {"settings": settings, "failed": failed})
            continue
        figures = {key: mean_and_error([rows[i][key] for i in sorted(rows)]) for key in FIGURES}
        note(
            row
            | {"settings": settings, "pictures": len(rows)}
            | {key: [round(v, 5) for v in pair] for key, pair in figures.items()}
            | rounds.cost(cost, len(rows))
            | {
                "each_crps": [round(rows[i]["crps"], 5) for i in sorted(rows)],
                "each_psnr_mean": [round(rows[i]["psnr_mean"], 3) for i in sorted(rows)],
            }
        )


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report, its rows one a line."""
    head = json.dumps({k: v for k, v in report.items() if k != "rows"}, indent=1)
    rows = ",\n  ".join(json.dumps(r) for r in report["rows"])
    path.write_text(f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n')


def merge(
    out: Path,
    parts: Sequence[Path],
    tasks: Mapping[str, str],
    contenders: Sequence[Contender],
    processes: int | None = None,
) -> None:
    """Join the files of several parts, in the order of tasks and contenders.

    Parameters
    ----------
    out, parts
        Where to write, and the files; the first says what all rows share, and rows of another precision say theirs.
    tasks, contenders
        In their order.
    processes
        How many shared a machine; as many as there are files if None.

    Raises
    ------
    InputError
        If a task and a contender come twice, or files differ in more than their precision and processes.
    """
    reports = [json.loads(p.read_text()) for p in parts]
    names, rows, first = [c.name for c in contenders], {}, reports[0]
    for report, path in zip(reports, parts, strict=True):
        odd = [k for k in first if k not in {"rows", "precision", "processes"} and report.get(k) != first[k]]
        if odd:
            raise InputError(f"{path} and {parts[0]} differ in {', '.join(odd)}; join files of one benchmark.")
        own = {} if report.get("precision") == first.get("precision") else {"precision": report["precision"]}
        for r in report["rows"]:
            key = (list(tasks).index(r["task"]), names.index(r["contender"]))
            if key in rows:
                raise InputError(f"{path} holds {r['contender']} on {r['task']} again; leave one of the files out.")
            rows[key] = r | (own if "failed" not in r else {})
    write(out, first | {"processes": processes or len(parts), "rows": [rows[key] for key in sorted(rows)]})


def join(parts: Sequence[Path], lists: Sequence[str]) -> dict[str, Any]:
    """Join the lists of reports that agree in all else: runs on one kind of device.

    Raises
    ------
    InputError
        If they differ, in the device or the versions, say.
    """
    reports: list[dict[str, Any]] = [json.loads(p.read_text()) for p in parts]
    first = reports[0]
    for path, other in zip(parts, reports, strict=True):
        odd = [k for k in first if k not in lists and other.get(k) != first[k]]
        if odd:
            raise InputError(f"{path} and {parts[0]} differ in {', '.join(odd)}; join files of one device.")
    return first | {key: [row for r in reports for row in r[key]] for key in lists}
