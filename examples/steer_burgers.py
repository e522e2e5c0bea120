"""Steer Burgers' equation from one state to another with a trained prior, judge by the equation, and draw it.

    python examples/steer_burgers.py --out . [--case 2] [--search 12] [--solver-calls 0] [--animation]

The prior is told the initial state and the target, and draws a forcing together with the states that it leads to; a
search through the prior makes it cheaper; ``--solver-calls`` lets L-BFGS go on through the solver's adjoint. A
minute on two CPU cores. The judge is the equation: the picture's states are solved, not drawn.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import invdiff
from invdiff.pde import BurgersCost, BurgersSetting, PriorSolver, burgers_judge, optimal_forcing


def cells(values: torch.Tensor) -> np.ndarray:
    """Centres of the grid's cells."""
    return (np.arange(len(values)) + 0.5) / len(values)


def picture(states: torch.Tensor, forcing: torch.Tensor, idle: torch.Tensor, target: torch.Tensor, T: float) -> Figure:
    """States and forcing over space and time, and the final states beside the target."""
    figure = Figure(figsize=(11.0, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axis, values, name in ((left, states, "state u"), (middle, forcing, "forcing f")):
        top = float(values.abs().max())
        image = axis.imshow(
            values.numpy(), origin="lower", aspect="auto", extent=(0, 1, 0, T), cmap="RdBu_r", vmin=-top, vmax=top
        )
        axis.set(xlabel="x", ylabel="time", title=name)
        figure.colorbar(image, ax=axis)
    x = cells(target)
    right.plot(x, target.numpy(), "k", linewidth=3, alpha=0.35, label="target")
    right.plot(x, states[-1].numpy(), "C0", label="steered")
    right.plot(x, idle[-1].numpy(), "C7--", label="without forcing")
    right.plot(x, states[0].numpy(), "C1:", label="initial state")
    right.set(xlabel="x", ylabel="u", title="at the end")
    right.legend(fontsize=8)
    return figure


def animation(states: torch.Tensor, forcing: torch.Tensor, target: torch.Tensor, T: float, path: Path) -> None:
    """State, target and forcing as time passes."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained", dpi=80)
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    x = cells(target)
    above.plot(x, target.numpy(), "k", linewidth=3, alpha=0.3, label="target")
    (state,) = above.plot(x, states[0].numpy(), "C0", label="state")
    (force,) = below.plot(x, forcing[0].numpy(), "C3")
    above.legend(loc="upper right", fontsize=8)
    top, high = 1.1 * float(states.abs().max()), 1.1 * float(forcing.abs().max())
    above.set(ylim=(-top, top), ylabel="u")
    below.set(ylim=(-high, high), ylabel="f", xlabel="x")

    def draw(k: int) -> tuple[()]:
        state.set_ydata(states[k].numpy())
        force.set_ydata(forcing[min(k, len(forcing) - 1)].numpy())
        above.set_title(f"time {k * T / len(forcing):.1f} of {T:g}", fontsize=9)
        return ()

    FuncAnimation(figure, draw, frames=len(states), blit=False).save(path, writer=PillowWriter(fps=16))


def main() -> None:
    """Solve, judge and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=int, default=2)
    parser.add_argument("--search", type=int, default=12, help="calls of the search through the prior")
    parser.add_argument("--solver-calls", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--animation", action="store_true", help="a moving picture too, steer_burgers.gif")
    options = parser.parse_args()

    problem = invdiff.load_problem("burgers-control", options.case)
    prior = invdiff.load_prior("burgers-wavelet")
    solution = invdiff.solve(problem, prior, invdiff.samplers.WDNO(), draws=1, seed=0)
    forcing = solution.draws["forcing"][0].double()
    print(f"drawn by the prior:        J = {float(burgers_judge(problem.card, forcing[None]).J):.4f}")

    setting = BurgersSetting.named("wdno")
    initial, target = problem.given["initial"], problem.given["target"]
    if options.search:
        learned = BurgersCost(PriorSolver(prior, levels=(80.0, 1.0), draws=2), initial, target)
        forcing = optimal_forcing(learned, start=forcing, calls=options.search, smooth=(5.0, 8.0)).forcing
        print(f"searched through it:       J = {float(burgers_judge(problem.card, forcing[None]).J):.4f}")
    if options.solver_calls:
        cost = BurgersCost(setting.solver(), initial, target)
        forcing = optimal_forcing(cost, start=forcing, calls=options.solver_calls).forcing
        J = float(burgers_judge(problem.card, forcing[None]).J)
        print(f"{options.solver_calls:3d} calls of the solver:   J = {J:.4f}")
    none = torch.zeros_like(forcing)
    print(f"without forcing:           J = {float(burgers_judge(problem.card, none[None]).J):.4f}")

    both = setting.solver()(initial.expand(2, -1), torch.stack((forcing, none)))
    picture(both[0], forcing, both[1], target, setting.duration).savefig(options.out / "steer_burgers.png", dpi=110)
    if options.animation:
        animation(both[0], forcing, target, setting.duration, options.out / "steer_burgers.gif")
    print("written:", solution.save(options.out / "steer_burgers.nc"))


if __name__ == "__main__":
    main()
