"""How wide was the blur, and how strong the noise? The evidence of the measurement answers, without the truth.

A random field is blurred by a Gaussian kernel of unknown width, and noise of unknown strength is added. Every guess is
a model; the probability p(y) that it gives the measurement, averaged over all fields of the prior, is its evidence. A
model that explains less, or that could explain much more than there is, has less of it. `TransportLangevin` estimates
its logarithm on the way to the draws; here the prior is Gaussian, so that the exact value stands beside it. The misfit
of the draws sees the noise level, but cannot tell one width from another: each is fitted by some field.

With a trained prior the same call works, and needs care: the estimate falls short by more than models differ unless
particles and levels are many. Compare runs with twice as many before trusting it.

    python examples/choose_a_blur_by_evidence.py --out .
"""

import argparse
from pathlib import Path

import torch

import invdiff
from invdiff import likelihoods, operators, priors, samplers

SHAPE = (1, 24, 24)
WIDTH, NOISE_STD = 1.5, 0.05
WIDTHS, NOISE_STDS = (1.0, 1.25, 1.5, 1.75, 2.0), (0.03, 0.04, 0.05, 0.065, 0.08)


def blur(width: float) -> operators.Blur:
    """Gaussian blur with a standard deviation in pixels."""
    return operators.Blur(operators.gaussian_kernel(11, width), SHAPE, boundary="reflect")


def main(out: Path, draws: int, steps: int) -> None:
    """Measure once, solve under every guess, compare the evidence, and draw it."""
    import matplotlib.pyplot as plt

    prior = priors.FieldPrior.power_law(SHAPE, exponent=3.0, std=0.2, mean=0.5)
    measured = invdiff.Problem.simulate(blur(WIDTH), prior.sample(1, seed=3)[0], noise_std=NOISE_STD, seed=0)
    y = measured.likelihood.measurement[0]
    # Weighted particles, and levels where the weights need them: then the evidence is unbiased up to the transport.
    sampler = samplers.TransportLangevin(
        steps=steps, refreshes=2, resampling=samplers.Systematic(), conditional_ess=0.8
    )

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    for axis, guesses, truth, label in (
        (axes[0], [(width, NOISE_STD) for width in WIDTHS], WIDTH, "width of the blur, pixels"),
        (axes[1], [(WIDTH, noise) for noise in NOISE_STDS], NOISE_STD, "standard deviation of the noise"),
    ):
        values, found, exact = (WIDTHS if axis is axes[0] else NOISE_STDS), [], []
        for (width, noise_std), value in zip(guesses, values, strict=True):
            problem = invdiff.Problem(likelihoods.Gaussian(blur(width), y, noise_std))
            solution = invdiff.solve(problem, prior, sampler, draws=draws, chains=2, seed=0, dtype=torch.float64)
            found.append(solution.log_evidence)
            exact.append(prior.posterior(blur(width), y, noise_std).log_evidence)
            chi = solution.check()["reduced_chi_square"]
            print(f"{label} {value:g}: log evidence {found[-1]:.1f} (exact {exact[-1]:.1f}), chi-square {chi:.2f}")
            if (width, noise_std) == (WIDTH, NOISE_STD):
                solution.save(out / "choose_a_blur_by_evidence.nc")
        print(f"-> {values[found.index(max(found))]:g}; the truth is {truth:g}\n")
        axis.plot(values, exact, "k-", label="exact")
        axis.plot(values, found, "o", label="TransportLangevin")
        axis.axvline(truth, color="0.6", linestyle="--", label="truth")
        axis.set_xlabel(label)
    axes[0].set_ylabel("log evidence, nats")
    axes[0].legend()
    figure.savefig(out / "choose_a_blur_by_evidence.png", dpi=120)
    print("written:", out / "choose_a_blur_by_evidence.nc")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the results")
    parser.add_argument("--draws", type=int, default=100, help="particles in each of two ensembles")
    parser.add_argument("--steps", type=int, default=30, help="noise levels, at least; more cost more time")
    args = parser.parse_args()
    main(args.out, args.draws, args.steps)
