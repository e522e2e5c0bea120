"""Tomography from few angles: twelve X-ray views of a slice, with intervals for what they leave open.

A detector turns around a slice and measures line integrals of its density, in pixel lengths, from twelve directions
only. Filtered back-projection fills the gaps with streaks; the posterior fills them with what a Gaussian field of such
slices admits, and its standard deviation shows where the views do not reach.

    python examples/tomography_from_few_angles.py --out .
"""

import argparse
from pathlib import Path

import invdiff
from invdiff import metrics, operators, priors


def main(out: Path) -> None:
    """Simulate the views, reconstruct, and compare with filtered back-projection."""
    prior = priors.FieldPrior.matern((1, 48, 48), length=6.0, std=0.15, mean=0.5)  # density relative to bone
    views = operators.Tomography((1, 48, 48), angles=12)
    problem = invdiff.Problem.simulate(views, prior.sample(1, seed=4)[0].float(), noise_std=0.4, seed=0)
    solution = invdiff.solve(problem, prior, draws=40, seed=0)
    fbp = views.filtered_back_projection(solution.measurement[None])[0]
    for name, x in (("filtered back-projection", fbp), ("posterior mean", solution.mean())):
        print(f"{name}: root mean square error {(x - problem.reference).square().mean().sqrt():.3f}")
    inside = metrics.coverage(solution.draws, problem.reference)
    print(f"{inside:.1%} of the slice lies in its 90 % interval; {solution.check()}")
    solution.plot().savefig(out / "tomography_from_few_angles.png")
    print("written:", solution.save(out / "tomography_from_few_angles.nc"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the results")
    main(parser.parse_args().out)
