"""The command ``demo``: a portrait out of motion blur and noise, on a laptop's processor, in under a minute."""

from pathlib import Path

import torch
from torch import Tensor

from invdiff import operators, samplers
from invdiff.problem import Problem
from invdiff.solve import as_device, solve

SIDE = 64
NOISE_STD = 0.05
DRAWS = 20
KERNEL = {"size": 13, "intensity": 0.5, "seed": 3}
# One evaluation a step, and one more for the prior's mean: at most 20 a draw.
SAMPLER = samplers.PiGDM(steps=19, covariance=samplers.Spectral())


def portrait() -> Tensor:
    """Eileen Collins, astronaut (NASA, public domain; shipped with scikit-image): (3, 64, 64), sRGB in [0, 1]."""
    from skimage.data import astronaut

    photograph = astronaut()  # type: ignore[no-untyped-call]  # scikit-image has no types
    face = torch.from_numpy(photograph[0:192, 128:320].copy()).permute(2, 0, 1).double() / 255.0
    return torch.nn.functional.avg_pool2d(face[None], 192 // SIDE)[0].float()


def demo_problem(seed: int = 0) -> Problem:
    """Blur the portrait as a shaking camera does, and add noise."""
    truth = portrait()
    blur = operators.Blur(operators.motion_kernel(**KERNEL), tuple(truth.shape), boundary="reflect")  # type: ignore[arg-type]
    return Problem.simulate(blur, truth, noise_std=NOISE_STD, seed=seed, name="demo: motion blur")


def run_demo(folder: Path, *, device: str | None, seed: int) -> None:
    """Restore the portrait, write ``invdiff-demo.png`` and ``invdiff-demo.nc`` into a folder, and print scores.

    Raises
    ------
    InvdiffError
        If the folder cannot be written, the device is unknown, or the prior is missing or damaged.
    """
    from rich.console import Console

    from invdiff.cli_cost import micro_batch
    from invdiff.cli_processes import best_device
    from invdiff.cli_solve import check_writable, kept, print_table, scores, write
    from invdiff.priors.loading import load_prior

    console = Console(highlight=False, soft_wrap=True)
    out, picture = folder / "invdiff-demo.nc", folder / "invdiff-demo.png"
    for path in (out, picture):
        check_writable(path)
    place = as_device(device) or best_device()
    prior = load_prior("photos-64")
    console.print(
        f"A portrait of {SIDE} x {SIDE} pixels was blurred by a shaking camera, and noise of {NOISE_STD} was added. "
        f"Drawing {DRAWS} restorations that fit it:"
    )
    try:
        solution = solve(
            demo_problem(seed),
            prior,
            SAMPLER,
            draws=DRAWS,
            seed=seed,
            device=place,
            micro_batch=micro_batch(prior.shape, DRAWS, place),
            progress="restoring",
        )
        write(solution, out, picture)
    except KeyboardInterrupt as interrupt:
        interrupt.kept = kept(None)  # type: ignore[attr-defined]  # the one who reports it looks for it
        raise
    about, chi = solution.about, float(solution.check()["reduced_chi_square"])
    rows = [
        *scores(solution),
        ("check", f"reduced chi-square {chi:.3f} (near 1: the draws explain the measurement)"),
        ("took", f"{about['seconds']:.1f} s, {about['evaluations_per_draw']:.4g} network evaluations a draw"),
    ]
    print_table(console, rows)
    console.print("This is an illustration on one picture, not a benchmark.", style="dim")
    console.print(f"Wrote [bold]{picture}[/] (look at it) and [bold]{out}[/] (invdiff.Solution.load reads it).")
