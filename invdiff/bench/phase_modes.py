"""Whether samplers find both modes of phase retrieval on photographs, as one JSON file and a table.

    python -m invdiff.bench.phase_modes --data FOLDER --out docs/phase_modes.json --table docs/phase_modes_table.md

Rotated by 180 degrees, a picture has the same Fourier magnitudes. A draw is counted as upright where its correlation
with the truth is above 0.8 in every channel, as rotated where that with the rotated truth is, and as neither else:
colours rotated apart, or a picture that was not found. The prior may hold one of the modes for more likely, so that
their shares need not be equal; both should be met.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import invdiff
from invdiff.bench.rounds import write
from invdiff.bench.tasks import NOISE_STD, pictures
from invdiff.noise import stream_key
from invdiff.operators import PhaseRetrieval
from invdiff.potential import Tempered
from invdiff.priors.loading import load_prior
from invdiff.problem import Problem
from invdiff.samplers import DAPS, DPS, Langevin, Sampler, TransportLangevin
from invdiff.solve import solve

FOUND = 0.8
"""Least correlation, in every channel, of a draw with a mode."""
SLOPE = 0.5
"""Norm of dA/dz: magnitudes of an orthonormal transform of z / 2 + 1 / 2."""


def samplers(evaluations: int) -> dict[str, Sampler]:
    """Samplers by label, with so many network evaluations at most."""
    path = Tempered(scale=2.0 * NOISE_STD)  # the noise in latent units
    return {
        "TransportLangevin": TransportLangevin(steps=evaluations // 5, path=path, slope=SLOPE),
        "TransportLangevin, momentum": TransportLangevin(
            steps=evaluations // 3, refreshes=2, step_size=0.5, momentum=0.6, path=path, slope=SLOPE
        ),
        "DAPS": DAPS(steps=evaluations // 5, ode_steps=5, inner=Langevin(slope=SLOPE)),
        "DPS": DPS(steps=evaluations // 2),
    }


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of pictures (..., c, h, w), the least over channels."""
    a, b = (t - t.mean((-2, -1), keepdim=True) for t in (a, b))
    norms = a.square().sum((-2, -1)) * b.square().sum((-2, -1))
    return ((a * b).sum((-2, -1)) / norms.sqrt()).amin(-1)


def count(draws: Tensor, truth: Tensor) -> tuple[int, int]:
    """How many draws (n, c, h, w) show the truth (c, h, w), and how many show it rotated by 180 degrees."""
    upright, rotated = correlation(draws, truth), correlation(draws, truth.flip(-2, -1))
    return int((upright > FOUND).sum()), int((rotated > FOUND).sum())


def measure(truths: Tensor, prior: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every sampler on every picture; one row a sampler."""
    operator = PhaseRetrieval(tuple(truths.shape[1:]), options.oversampling)  # type: ignore[arg-type]
    problems = [
        Problem.simulate(operator, x, noise_std=NOISE_STD, seed=stream_key(0, "phase-modes", i))
        for i, x in enumerate(truths)
    ]
    rows = []
    for name, sampler in samplers(options.evaluations).items():
        if options.only and name not in options.only:
            continue
        solutions = solve(
            problems,
            prior,
            sampler,
            draws=options.draws,
            device=options.device,
            precision=options.precision,
            micro_batch=options.micro_batch,
        )
        counts = [count(s.draws.float().cpu(), x) for s, x in zip(solutions, truths, strict=True)]
        row = {
            "sampler": name,
            "settings": repr(sampler),
            "evaluations": solutions[0].about["evaluations_per_draw"],
            "backward": solutions[0].about["backward_evaluations_per_draw"],
            "upright": [c[0] for c in counts],
            "rotated": [c[1] for c in counts],
            "chi_square": [
                round(float(s.deviance.mean()) / problem.likelihood.measurements, 3)
                for s, problem in zip(solutions, problems, strict=True)
            ],
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def table(report: dict[str, Any], source: str) -> str:
    """Markdown from the file alone."""
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    about = (
        f"{report['pictures']} pictures of 64 x 64 of the test split, prior {report['prior']}, oversampling "
        f"{report['oversampling']:g}, noise {report['noise_std']:g}, {report['draws']} draws each; {report['device']}, "
        f"{report['precision']}; {versions}. Draws that show the picture upright + rotated by 180 degrees, picture by "
        "picture; the rest show neither. Passes: forward + backward."
    )
    lines = [f"Made from `{source}` by `python -m invdiff.bench.phase_modes`; not edited by hand.", "", about, ""]
    lines += ["| sampler | passes | upright + rotated, of each picture's draws | both modes found | chi-square |"]
    lines += ["| --- | --- | --- | ---: | --- |"]
    for r in report["rows"]:
        pairs = list(zip(r["upright"], r["rotated"], strict=True))
        both = sum(1 for pair in pairs if min(pair) > 0)
        lines.append(
            f"| {r['sampler']} | {r['evaluations']:.0f} + {r['backward']:.0f} | "
            f"{', '.join(f'{u} + {d}' for u, d in pairs)} | {both} of {len(pairs)} | "
            f"{', '.join(f'{c:.2f}' for c in r['chi_square'])} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Run, and write the file and its table."""
    parser = argparse.ArgumentParser(prog="invdiff.bench.phase_modes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--prior", default="photos-64")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--evaluations", type=int, default=300)
    parser.add_argument("--oversampling", type=float, default=2.0)
    parser.add_argument("--only", nargs="*", help="samplers; all if left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--micro-batch", type=int, default=64)
    options = parser.parse_args(arguments)
    prior: Any = load_prior(options.prior).to(options.device)
    truths = pictures(options.data, 64, "test", options.pictures)
    gpu = torch.device(options.device).type == "cuda"
    report = {
        "benchmark": "phase modes",
        "prior": options.prior,
        "prior_key": prior.key,
        "oversampling": options.oversampling,
        "noise_std": NOISE_STD,
        "pictures": len(truths),
        "draws": options.draws,
        "precision": options.precision,
        "device": torch.cuda.get_device_name() if gpu else platform.machine() + " CPU",
        "versions": {
            "invdiff": invdiff.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "rows": measure(truths, prior, options),
    }
    write(options.out, report)
    if options.table is not None:
        options.table.write_text(table(report, options.out.as_posix()))


if __name__ == "__main__":
    main()
