r"""Control of Burgers' equation as a cost of the forcing, and its optimum by gradients through the solver.

    J(f) = mean over seen cells of (u(T; f) - u*)^2 + weight sum_{t, x} f^2

with u* a target state and the sum over all windows and cells of the control grid: what WDNO (Hu et al. 2025) reports
with weight 2e-5, and DiffPhyCon (Wei et al. 2024, arXiv 2407.06494) with weight 0. As ``Objective(cost, temperature)``
it is a likelihood. `optimal_forcing` minimises it by L-BFGS (Byrd et al. 1995, SIAM J. Sci. Comput. 16) with the
solver's adjoint: the best that a method can do which may ask the solver as often as it likes, up to local minima.
"""

from contextlib import suppress
from dataclasses import dataclass
from math import sqrt
from typing import Any, Protocol, cast, final, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from invdiff.errors import InputError, ShapeError
from invdiff.operators.base import LinearOperator
from invdiff.operators.inpainting import Inpainting
from invdiff.operators.reshape import Reshape


@runtime_checkable
class Solver(Protocol):
    """Who says where a forcing leads: `Burgers`, or `PriorSolver`, which may answer several times."""

    @property
    def windows(self) -> int:
        """Windows of the forcing."""

    @property
    def points(self) -> int:
        """Cells of the control grid."""

    def __call__(
        self, initial: Float[Tensor, "n points"], forcing: Float[Tensor, "n windows points"], /
    ) -> Float[Tensor, "m states points"]:
        """Return states at the ends of all windows, m a multiple of n."""


@final
class BurgersCost(nn.Module):
    """Distance of the final state from a target, and the forcing's energy.

    Parameters
    ----------
    solver
        Who solves; a finer one judges more strictly. Where it answers several times, the misfit is their mean.
    initial, target
        Averages at the start and those wanted at the end, (points,), units of speed.
    weight
        Of the energy, not negative.
    observed
        Cells whose final state counts; all if None.
    controlled
        Cells whose forcing acts; in the others it is taken as zero. All if None.

    Raises
    ------
    ShapeError
        If states or masks do not have the solver's points.
    InputError
        If the weight is negative, nothing is observed, or nothing is controlled.
    """

    initial: Tensor
    target: Tensor
    observed: Tensor
    controlled: Tensor

    def __init__(
        self,
        solver: Solver,
        initial: Float[Tensor, " points"],
        target: Float[Tensor, " points"],
        *,
        weight: float = 2e-5,
        observed: Bool[Tensor, " points"] | None = None,
        controlled: Bool[Tensor, " points"] | None = None,
    ) -> None:
        super().__init__()
        every = torch.ones(solver.points, dtype=torch.bool, device=initial.device)
        observed, controlled = (every if m is None else m for m in (observed, controlled))
        for what, t in (("initial", initial), ("target", target), ("observed", observed), ("controlled", controlled)):
            if tuple(t.shape) != (solver.points,):
                raise ShapeError(f"The solver has {solver.points} points, {what} has the shape {tuple(t.shape)}.")
        if not weight >= 0.0:
            raise InputError(f"The weight of the energy is not negative, got {weight}.")
        if not bool(observed.any()) or not bool(controlled.any()):
            raise InputError("At least one cell must be observed, and one controlled; a mask is False everywhere.")
        self.solver, self.weight, self.in_shape = solver, weight, (solver.windows, solver.points)
        for name, t in (("initial", initial), ("target", target), ("observed", observed), ("controlled", controlled)):
            self.register_buffer(name, t.detach().clone())

    def final(self, forcing: Float[Tensor, "n windows points"]) -> Float[Tensor, "m points"]:
        """Averages at the end; answer by answer, where the solver gives several."""
        acting = torch.where(self.controlled, forcing, 0.0)
        states = self.solver(self.initial.to(forcing).expand(len(forcing), -1), acting)
        return states[:, -1]

    def distance(self, final: Float[Tensor, "n points"]) -> Float[Tensor, " n"]:
        """Mean squared distance of final states from the target over the observed cells."""
        return (final - self.target.to(final))[:, self.observed].square().mean(1)

    def misfit(self, forcing: Float[Tensor, "n windows points"]) -> Float[Tensor, " n"]:
        """Mean squared distance from the target over the observed cells."""
        return self.distance(self.final(forcing)).reshape(-1, len(forcing)).mean(0)

    def energy(self, forcing: Float[Tensor, "n windows points"]) -> Float[Tensor, " n"]:
        """Sum of the squared forcing that acts."""
        return torch.where(self.controlled, forcing, 0.0).square().sum((1, 2))

    def forward(self, forcing: Float[Tensor, "n windows points"]) -> Float[Tensor, " n"]:
        """J."""
        return self.misfit(forcing) + self.weight * self.energy(forcing)


@final
class TrajectoryCost(nn.Module):
    r"""J of whole trajectories: states (windows + 1, points) and forcing (windows, points), flat, one after the other.

    So stand an event's variables behind one tensor. Without a solver the final state is the trajectory's own, and
    whether forcing leads there is the prior's business; with it, it is what the cost's solver makes of the forcing, and
    the states are not looked at.

    Parameters
    ----------
    cost
        Target, weight and masks, and the solver.
    solve
        Whether the solver is asked.
    """

    def __init__(self, cost: BurgersCost, *, solve: bool = False) -> None:
        super().__init__()
        self.cost, self.solve = cost, bool(solve)
        windows, points = cost.in_shape
        self.in_shape = ((2 * windows + 1) * points,)

    def forward(self, x: Float[Tensor, "n size"]) -> Float[Tensor, " n"]:
        """J.

        Raises
        ------
        ShapeError
            If trajectories do not have as many values.
        """
        if tuple(x.shape[1:]) != self.in_shape:
            raise ShapeError(f"Trajectories have {self.in_shape[0]} values, states and forcing, got {tuple(x.shape)}.")
        windows, points = self.cost.in_shape
        forcing = x[:, (windows + 1) * points :].reshape(-1, windows, points)
        if self.solve:
            return self.cost(forcing)  # type: ignore[no-any-return]
        states = x[:, : (windows + 1) * points].reshape(-1, windows + 1, points)
        return self.cost.distance(states[:, -1]) + self.cost.weight * self.cost.energy(forcing)

    def measurement(
        self, temperature: float
    ) -> tuple[LinearOperator, Float64[Tensor, " measured"], Float64[Tensor, " measured"]]:
        r"""Return operator, measurement and noise whose Gaussian likelihood is exp(-J / temperature) up to a factor.

        Without a solver J is a sum of squares: the seen cells' final state measured as the target with variance
        ``cells * temperature / 2``, and the acting forcing measured as zero with variance ``temperature / (2 weight)``.

        Raises
        ------
        InputError
            If the solver is asked, for then the final state is not linear in the forcing.
        """
        if self.solve:
            raise InputError("A cost that asks the solver is no Gaussian measurement; take solve=False, or Objective.")
        cost, (windows, points) = self.cost, self.cost.in_shape
        mask = torch.zeros(2 * windows + 1, points, dtype=torch.bool)
        mask[windows] = cost.observed.cpu()
        if cost.weight > 0.0:
            mask[windows + 1 :] = cost.controlled.cpu()
        target = cost.target[cost.observed].double().cpu()
        y = torch.zeros(int(mask.sum()), dtype=torch.float64)
        y[: len(target)] = target
        std = torch.full_like(y, sqrt(len(target) * temperature / 2.0))
        std[len(target) :] = sqrt(temperature / (2.0 * cost.weight)) if cost.weight > 0.0 else 0.0
        return picked(mask), y, std


def picked(mask: Bool[Tensor, "rows points"], in_shape: tuple[int, ...] | None = None) -> LinearOperator:
    """Operator that picks values of trajectories, by row and point; diagonal in the standard basis.

    Parameters
    ----------
    mask
        Over the rows of all variables, one variable after the other: for Burgers' equation the states' and then the
        forcing's, (2 windows + 1, points).
    in_shape
        Of the trajectories, with as many values as the mask; flat if None.
    """
    size = mask.numel()
    flat = Reshape((size,) if in_shape is None else in_shape, (1, 1, size))
    return cast(LinearOperator, Inpainting(mask.reshape(1, size), (1, 1, size)) @ flat)


@final
@dataclass(frozen=True, kw_only=True)
class OptimalForcing:
    """What `optimal_forcing` found.

    Parameters
    ----------
    forcing
        (windows, points).
    cost
        J, as the solver of the search has it.
    calls
        Solver calls, each forward and backward.
    costs
        The lowest J after each call.
    """

    forcing: Tensor
    cost: float
    calls: int
    costs: tuple[float, ...] = ()


class _Spent(Exception):  # noqa: N818  no error: it ends a search whose line search would go on
    """All solver calls were made."""


def optimal_forcing(
    cost: BurgersCost,
    *,
    start: Float[Tensor, "windows points"] | None = None,
    calls: int = 100,
    smooth: tuple[float, float] | None = None,
) -> OptimalForcing:
    """Minimise J by L-BFGS with exact gradients, in float64.

    With ``smooth`` it looks among forcings S c, c free and S a Gaussian average over windows and cells. A solver that
    was learned has cheap answers in patterns that it never saw; smooth forcings hold few of them.

    Parameters
    ----------
    cost
        J; its solver's adjoint gives the gradient.
    start
        First forcing; zero if None.
    calls
        Solver calls, at most; each is one forward and one backward.
    smooth
        Standard deviations of S in windows and cells, positive; S is applied to the start too. Any forcing if None.

    Raises
    ------
    InputError
        If there is not one call, or a standard deviation is not positive.
    """
    from scipy.optimize import minimize

    if calls < 1:
        raise InputError(f"A search takes at least one solver call, got {calls}.")
    if smooth is not None and not min(smooth) > 0.0:
        raise InputError(f"The standard deviations of smooth forcings are positive, got {smooth}.")
    acting, device = cost.controlled.cpu(), cost.target.device
    c = torch.zeros(cost.in_shape, dtype=torch.float64) if start is None else start.detach().double().cpu().clone()
    c = torch.where(acting, c, 0.0)
    averages = [_averages(n, width) for n, width in zip(cost.in_shape, smooth or (), strict=False)]

    def forcing() -> Tensor:
        f = averages[0] @ c @ averages[1].mT if averages else c
        return torch.where(acting, f, 0.0)

    best: list[Any] = [float("inf"), forcing()]
    costs: list[float] = []

    def evaluate(values: Any) -> tuple[float, Any]:
        if len(costs) >= calls:
            raise _Spent
        c[:, acting] = torch.from_numpy(values).reshape(cost.in_shape[0], -1)
        f = forcing()
        leaf = f.to(device, copy=True).requires_grad_()
        J = cost(leaf[None])[0]
        slope = torch.where(acting, torch.autograd.grad(J, leaf)[0].cpu(), 0.0)
        slope = averages[0].mT @ slope @ averages[1] if averages else slope
        value = float(J.detach())
        if value < best[0]:
            best[:] = [value, f]
        costs.append(best[0])
        return value, slope[:, acting].flatten().numpy()

    options = {"maxfun": 10 * calls, "maxiter": 10 * calls, "ftol": 0.0, "gtol": 0.0}
    with suppress(_Spent):
        minimize(evaluate, c[:, acting].flatten().numpy(), jac=True, method="L-BFGS-B", options=options)
    return OptimalForcing(forcing=best[1], cost=best[0], calls=len(costs), costs=tuple(costs))


def _averages(n: int, width: float) -> Tensor:
    """Gaussian averages over n neighbours in a row, each row's weights summing to one: (n, n), float64."""
    i = torch.arange(n, dtype=torch.float64)
    weights = (-0.5 * ((i[:, None] - i) / width).square()).exp()
    return weights / weights.sum(1, keepdim=True)
