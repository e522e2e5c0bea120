"""Samplers against posteriors with several modes, known exactly, as one JSON file and a table made from it.

    python -m invdiff.bench.mixtures --out docs/mixtures.json --table docs/mixtures_table.md
        [--device cuda] [--quick] [--only PART-OR-SAMPLER ...] [--worker i/k]
    python -m invdiff.bench.mixtures --merge FILE FILE ... --out docs/mixtures.json --table ...

Every sampler gets the exact denoiser of a Gaussian mixture in float64, so that all error is its own. The runs of a row,
ensembles or measurements, are one batch. With ``--worker i/k`` one of k processes does its share; ``--merge`` joins
their files. The file is written after every row, holds no times and repeats on one kind of machine.
"""

import argparse
import json
import platform
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import invdiff
from invdiff.bench.mixtures_jobs import CHAINS, QUICK, RING_STD, Job, Plan, jobs
from invdiff.bench.mixtures_table import table
from invdiff.diagnostics.mixture_measures import Sliced, mode_shares, split_r_hat, total_variation
from invdiff.diagnostics.mixtures import MixtureProblem, parted_modes, random_mixture, wide_mixture
from invdiff.diagnostics.ring import RingProblem, ring_problem
from invdiff.errors import InputError
from invdiff.priors.mixture import MixturePrior
from invdiff.solution import Solution
from invdiff.solve import solve

SEED = 0


# One row.


@dataclass(frozen=True)
class Run:
    """What one ensemble of a solution holds: draws, log-weights or None, and log evidence or None."""

    z: Tensor
    log_weights: Tensor | None
    log_evidence: float | None


def ensembles(solution: Solution) -> list[Run]:
    """Split a solution of one variable into its ensembles; weighted particles where there are weights."""
    w, e = solution.log_weights, solution.chain_log_evidence
    kept = solution.by_chain if w is None or solution.particles is None else solution.particles
    (z,) = kept.values()
    return [Run(z[i].double(), None if w is None else w[i], None if e is None else float(e[i])) for i in range(len(z))]


def run(job: Job, device: str | None) -> dict[str, Any]:
    """Run one job."""
    if job.part == "ring":
        return _row(job, *_on_ring(job, ring_problem(noise_std=RING_STD), device))
    name = job.problem
    if job.part == "chains":
        cases = [parted_modes(float(name.split("-")[1]))]
    else:
        which = range(1, job.runs + 1) if job.part in {"other measurements", "wide"} else (0,)
        build: Callable[[int], MixtureProblem] = (
            wide_mixture if job.part == "wide" else lambda i: random_mixture(int(name.split("-")[1]), i)
        )
        cases = [build(i) for i in which]
    return _row(job, *_on_mixtures(job, cases, device))


Figures = dict[str, list[float]]


def _sampled(
    job: Job, problems: list[Any], prior: MixturePrior, device: str | None
) -> tuple[list[Run], dict[str, Any]]:
    """Run the sampler on problems, with as many ensembles of each as make ``runs``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solutions = solve(
            problems, prior, job.sampler, draws=job.particles, chains=job.runs // len(problems), seed=SEED,
            device=device, dtype=torch.float64,
        )  # fmt: skip
    about = {
        "evaluations": round(solutions[0].about["evaluations_per_draw"], 2),
        "backward": round(solutions[0].about["backward_evaluations_per_draw"], 2),
        "warnings": sorted({str(w.message) for w in caught}),
    }
    return [r for s in solutions for r in ensembles(s)], about


_NOTHING: dict[str, Any] = {"evaluations": 0.0, "backward": 0.0, "warnings": []}


def _on_mixtures(job: Job, cases: list[MixtureProblem], device: str | None) -> tuple[Figures, dict[str, Any]]:
    exact = [case.exact for case in cases for _ in range(job.runs // len(cases))]
    if job.sampler is None:
        runs, about = [Run(e.sample(job.particles, seed=i), None, None) for i, e in enumerate(exact)], _NOTHING
    else:
        runs, about = _sampled(job, [case.problem for case in cases], cases[0].prior, device)
    references = [
        r for r in [Sliced.of_mixture(case.exact.law) for case in cases] for _ in range(job.runs // len(cases))
    ]
    found: Figures = {"w2": [], "mode_error": [], "evidence_error": []}
    for r, e, reference in zip(runs, exact, references, strict=True):
        found["w2"].append(reference.distance(r.z, r.log_weights))
        found["mode_error"].append(total_variation(mode_shares(r.z, e.law, r.log_weights), e.law.weights))
        found["evidence_error"].append(nan if r.log_evidence is None else r.log_evidence - e.log_evidence)
    if job.part == "chains":
        law, together = exact[0].law, torch.stack([r.z for r in runs]).reshape(-1, CHAINS, *runs[0].z.shape)
        found["r_hat"] = [split_r_hat(chains) for chains in together]
        found["joint_mode_error"] = [
            total_variation(mode_shares(chains.flatten(0, 1), law), law.weights) for chains in together
        ]
    return found, about


def _on_ring(job: Job, case: RingProblem, device: str | None) -> tuple[Figures, dict[str, Any]]:
    if job.sampler is None:
        runs, about = [Run(case.sample(job.particles, seed=i), None, None) for i in range(job.runs)], _NOTHING
    else:
        runs, about = _sampled(job, [case.problem], case.prior, device)
    mean, std = case.radius
    found: Figures = {"angle_error": [], "radius_error": [], "radius_std_ratio": [], "evidence_error": []}
    for r in runs:
        found["angle_error"].append(case.angle_error(r.z, r.log_weights))
        m, s = case.radius_of(r.z, r.log_weights)
        found["radius_error"].append((m - mean) / std)
        found["radius_std_ratio"].append(s / std)
        found["evidence_error"].append(nan if r.log_evidence is None else r.log_evidence - case.log_evidence)
    return found, about


def _row(job: Job, figures: Figures, about: dict[str, Any]) -> dict[str, Any]:
    """Mean, standard error, root mean square and largest size of every figure over the runs."""
    found: dict[str, Any] = {}
    for name, values in figures.items():
        v = torch.tensor(values, dtype=torch.float64)
        if bool(v.isnan().all()):
            continue
        se = float(v.std()) / sqrt(len(v)) if len(v) > 1 else nan
        summary = {
            "mean": float(v.mean()),
            "se": se,
            "rms": float(v.square().mean().sqrt()),
            "max": float(v.abs().max()),
        }
        found[name] = {k: None if s != s else round(s, 5) for k, s in summary.items()}
    part, problem, label, steps, particles = job.key
    head = {"part": part, "problem": problem, "sampler": label, "steps": steps, "particles": particles}
    return {**head, "runs": job.runs, "settings": "" if job.sampler is None else repr(job.sampler), **about, **found}


# The file.


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """`Job.key` of a row."""
    return tuple(row[k] for k in ("part", "problem", "sampler", "steps", "particles"))


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """Run this process's share, and write the file after every row; with ``only``, into the file there is."""
    before = json.loads(options.out.read_text()) if options.only and options.out.exists() else None
    wanted = [
        j
        for j in jobs(QUICK if options.quick else Plan())
        if not options.only or {j.part, j.problem, j.label} & set(options.only)
    ]
    index, workers = (int(part) for part in options.worker.split("/"))
    if workers > 1:  # neighbours cost alike, and every other row is cheap
        shuffled = torch.randperm(len(wanted), generator=torch.Generator().manual_seed(0)).tolist()
        wanted = [wanted[i] for i in shuffled[index::workers]]
    device = torch.device(options.device or "cpu")
    report: dict[str, Any] = {
        "benchmark": "mixtures",
        "quick": options.quick,
        "seed": SEED,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": "float64",
        "versions": {
            "invdiff": invdiff.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
        "rows": [],
    }
    for job in wanted:
        row = run(job, options.device)
        report["rows"].append(row)
        shown = {k: v["rms"] for k, v in row.items() if isinstance(v, dict)}
        print(json.dumps({k: row[k] for k in ("part", "problem", "sampler", "steps", "particles")} | shown), flush=True)
        write(options.out, report if before is None else merge([before, report]))
    return report if before is None else merge([before, report])


def merge(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join reports in the order of the plan; a row that was run again replaces the first.

    Raises
    ------
    InputError
        If they were not made alike.
    """
    heads = [{k: v for k, v in r.items() if k != "rows"} for r in reports]
    for head in heads[1:]:
        for name in heads[0].keys() | head.keys():
            if heads[0].get(name) != head.get(name):
                raise InputError(
                    f"One file's {name} is {heads[0].get(name)}, another's {head.get(name)}; run everything again."
                )
    order = [job.key for job in jobs(QUICK if heads[0]["quick"] else Plan())]
    rows = {key_of(r): r for report in reports for r in report["rows"]}
    return heads[0] | {"rows": [rows[k] for k in order if k in rows]}


def write(path: Path, report: dict[str, Any]) -> None:
    """Write a report."""
    path.write_text(json.dumps(report, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark, or join its parts, and write the file and its table."""
    parser = argparse.ArgumentParser(prog="invdiff.bench.mixtures", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, help="Markdown made from the file")
    parser.add_argument("--device")
    parser.add_argument("--quick", action="store_true", help="few particles, runs and dimensions")
    parser.add_argument("--only", nargs="*", default=(), help="parts, problems or samplers, in the file there is")
    parser.add_argument("--worker", default="0/1", help="i/k: this process's share")
    parser.add_argument("--merge", type=Path, nargs="+", help="files of the workers to join; runs nothing")
    options = parser.parse_args(arguments)
    # Small tensors: more threads cost more than they give.
    torch.set_num_threads(1)
    parts = [json.loads(path.read_text()) for path in options.merge or ()]
    report = merge(parts) if parts else collect(options)
    write(options.out, report)
    if options.table is not None:
        options.table.write_text(table(json.loads(options.out.read_text()), options.out.as_posix()))


if __name__ == "__main__":
    main()
