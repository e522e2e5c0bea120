"""A prior of one's own: one of a few known shapes, seen through a coarse and noisy camera.

A prior needs no base class: `shape`, `sigma_min`, `sigma_max` and `denoise` are enough, and `check_prior` says
whether they keep the contract. Here the unknown is one of four shapes, all equally likely, so that the denoiser is a
softmax, and Bayes' rule over four cases gives the exact answer.

    python examples/your_own_prior.py --out .
"""

import argparse
from pathlib import Path

import torch

import invdiff
from invdiff import operators, samplers
from invdiff.diagnostics.prior_checks import check_prior

NAMES = ("disc", "square", "plus", "cross")


class OneOf:
    """Equally likely pictures: E[z_0 | z] is their mean, weighted by N(z; picture, sigma^2)."""

    sigma_min, sigma_max = 0.01, 100.0  # far below the pictures' distances, and far above

    def __init__(self, pictures: torch.Tensor) -> None:
        self.pictures, self.shape = pictures, tuple(pictures.shape[1:])

    def denoise(self, z: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """E[z_0 | z_sigma = z] for z of shape (n, c, h, w) and sigma a float or of shape (n,)."""
        known = self.pictures.to(z).flatten(1)
        distance = (z.flatten(1)[:, None] - known).square().sum(-1)  # (n, pictures)
        variance = torch.as_tensor(sigma, dtype=z.dtype, device=z.device).reshape(-1, 1) ** 2
        return (torch.softmax(-0.5 * distance / variance, dim=1) @ known).reshape(z.shape)


def shapes(size: int = 16) -> torch.Tensor:
    """Four shapes of similar area, (4, 1, size, size), values 0 and 1."""
    a = torch.linspace(-1, 1, size)
    y, x = a[:, None], a[None]
    disc, square = x**2 + y**2 < 0.45, torch.maximum(x.abs() + 0 * y, y.abs() + 0 * x) < 0.6
    plus = (torch.minimum(x.abs() + 0 * y, y.abs() + 0 * x) < 0.2) & (
        torch.maximum(x.abs() + 0 * y, y.abs() + 0 * x) < 0.95
    )
    cross = (torch.minimum((x - y).abs(), (x + y).abs()) < 0.3) & (x**2 + y**2 < 1.1)
    return torch.stack([disc, square, plus, cross])[:, None].double()


def main(out: Path) -> None:
    """Check the prior, solve, and compare with Bayes' rule."""
    prior = OneOf(shapes())
    report = check_prior(prior)
    print(f"the prior keeps its contract; spread left at sigma_max: {report.spread_at_sigma_max:.3f} of its own")
    camera = operators.Downsampling(shape=(1, 16, 16), factor=4)
    problem = invdiff.Problem.simulate(camera, prior.pictures[0].float(), noise_std=0.4, seed=2)
    solution = invdiff.solve(problem, prior, samplers.ImportanceSampling(), draws=1000, chains=4, seed=0)
    log_probs = problem.likelihood.log_prob(prior.pictures.float()).double()
    exact, exact_evidence = torch.softmax(log_probs, 0), torch.logsumexp(log_probs, 0) - torch.tensor(4.0).log()
    nearest = torch.cdist(solution.draws.flatten(1).double(), prior.pictures.flatten(1)).argmin(1)
    for name, p, q in zip(NAMES, exact, torch.bincount(nearest, minlength=4) / len(nearest), strict=True):
        print(f"{name:>6}: probability {p:.3f}, share of the draws {q:.3f}")
    print(f"log evidence {solution.log_evidence:.3f} +- {solution.log_evidence_se:.3f}, exact {exact_evidence:.3f}")
    solution.plot().savefig(out / "your_own_prior.png")
    print("written:", solution.save(out / "your_own_prior.nc"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the results")
    main(parser.parse_args().out)
