"""An operator of one's own: a map known only through the means of its rows and columns.

Soil moisture is mapped on a square field, but the sensors are cables: each reports the mean along one row or one
column. The operator is a class with `forward` and `adjoint`; `check_operator` confirms that they belong together. The
prior is an analytic Gaussian field, whose exact posterior is known, so that the draws can be held against it.

    python examples/your_own_operator.py --out .
"""

import argparse
from pathlib import Path

import torch

import invdiff
from invdiff import operators, priors
from invdiff.testing import check_operator


class RowAndColumnMeans(operators.LinearOperator):
    """Means along the rows, then along the columns, of a map: (n, 1, h, w) -> (n, h + w), in the map's units."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        _, h, w = shape
        super().__init__(shape, (h + w,))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Average: (n, 1, h, w) -> (n, h + w)."""
        return torch.cat([x[:, 0].mean(2), x[:, 0].mean(1)], dim=1)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """Spread every mean over the values it was made of: (n, h + w) -> (n, 1, h, w)."""
        _, h, w = self.in_shape
        rows, columns = y.split([h, w], dim=1)
        return (rows[:, :, None] / w + columns[:, None, :] / h)[:, None]


def main(out: Path) -> None:
    """Check the operator, solve, and compare with the exact posterior."""
    A = RowAndColumnMeans((1, 24, 24))
    print(check_operator(A))
    prior = priors.FieldPrior.matern((1, 24, 24), length=8.0, std=0.05, mean=0.25)  # volumetric moisture, m3 m-3
    problem = invdiff.Problem.simulate(A, prior.sample(1, seed=1)[0].float(), noise_std=0.005, seed=0)
    solution = invdiff.solve(problem, prior, draws=200, seed=0)
    exact = prior.posterior(A, solution.measurement, noise_std=0.005)
    z = (solution.mean() - exact.mean) / exact.std * 200**0.5
    print(f"mean against the exact posterior: rms {z.square().mean().sqrt():.2f} standard errors (1 is expected)")
    print(f"std over the exact one: {(solution.std() / exact.std).mean():.3f}; {solution.check()}")
    solution.plot().savefig(out / "your_own_operator.png")
    print("written:", solution.save(out / "your_own_operator.nc"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the results")
    main(parser.parse_args().out)
