"""Are a sampler's intervals right? Two samplers calibrated by simulation on one problem.

Truths are drawn from the prior, blurred and made noisy; each is ranked among the draws that a sampler makes from its
measurement. For posterior draws all ranks are equally likely. Moment matching passes; gradient guidance, whose spread
follows from a setting and not from the noise, does not.

    python examples/calibrate_a_sampler.py --out .
"""

import argparse
from pathlib import Path

import invdiff
from invdiff import operators, priors, samplers
from invdiff.diagnostics.calibration import calibrate


def main(out: Path) -> None:
    """Calibrate both, draw the rank histograms of the first, and solve one problem."""
    prior = priors.FieldPrior.power_law((1, 12, 12), exponent=3.0, std=0.2, mean=0.5)
    blur = operators.Blur(operators.gaussian_kernel(5, 1.0), prior.shape)
    for sampler in (samplers.PiGDM(steps=60, covariance=samplers.Spectral()), samplers.DPS(steps=60)):
        found = calibrate(blur, prior, sampler, noise_std=0.05, truths=48, draws=19, seed=0)
        print(found, end="\n\n")
        if isinstance(sampler, samplers.PiGDM):
            found.plot()[0].figure.savefig(out / "calibrate_a_sampler.png")
    problem = invdiff.Problem.simulate(blur, prior.sample(1, seed=9)[0].float(), noise_std=0.05, seed=0)
    solution = invdiff.solve(problem, prior, draws=20, seed=0)
    print("written:", solution.save(out / "calibrate_a_sampler.nc"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the results")
    main(parser.parse_args().out)
