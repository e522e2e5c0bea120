"""Deblur a photograph with the shipped prior, and see how sure the answer is.

A photograph of 64 x 64 pixels is blurred by a shaking camera and noise is added. Each draw is a picture that the
measurement allows and the prior `photos-64` finds plausible; where they differ, the measurement does not say. `check`
compares the residuals with the noise, and `score` the draws with the truth, which is known here because the blur was
simulated.

    python examples/deblur_a_photograph.py --out .
"""

import argparse
from pathlib import Path

import torch

import invdiff
from invdiff import operators, samplers


def photograph(size: int = 64) -> torch.Tensor:
    """Read a portrait that scikit-image brings along: (3, size, size), values in [0, 1]."""
    from skimage import data, transform

    picture = transform.resize(data.astronaut()[:256, 96:352], (size, size), anti_aliasing=True)
    return torch.from_numpy(picture).permute(2, 0, 1).float()


def main(out: Path, draws: int) -> None:
    """Blur, solve, check, score, save and plot."""
    prior = invdiff.load_prior("photos-64")
    blur = operators.Blur(operators.motion_kernel(11, seed=1), shape=(3, 64, 64), boundary="reflect")
    problem = invdiff.Problem.simulate(blur, photograph(), noise_std=0.02, seed=0)
    # The prior comes with the measured error of its denoiser, so that guidance needs no gradients through the network.
    sampler = samplers.PiGDM(steps=25, covariance=samplers.Spectral())
    solution = invdiff.solve(problem, prior, sampler, draws=draws, seed=0, progress=True)
    print("against the noise:", solution.check())
    print("against the truth:", solution.score())
    solution.plot().savefig(out / "deblur_a_photograph.png")
    print("written:", solution.save(out / "deblur_a_photograph.nc"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the results")
    parser.add_argument("--draws", type=int, default=4, help="posterior draws; the time grows with them")
    args = parser.parse_args()
    main(args.out, args.draws)
