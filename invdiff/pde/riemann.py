r"""The exact solution of Riemann's problem of the Euler equations.

Two constant states meet at x = 0. Between them lie a contact, of speed u* between regions of equal pressure p*, and on
each side a shock or a rarefaction (Toro, Riemann Solvers and Numerical Methods for Fluid Dynamics, chapter 4). p* is
the root of

    f(p) = f_L(p) + f_R(p) + u_R - u_L,
    f_K(p) = (p - p_K) sqrt(A_K / (p + B_K))                                   where p > p_K (shock),
           = 2 c_K / (gamma - 1) ((p / p_K)^((gamma - 1) / (2 gamma)) - 1)     else (rarefaction),

equations 4.5 to 4.7 there, with A_K = 2 / ((gamma + 1) rho_K) and B_K = (gamma - 1) / (gamma + 1) p_K. f rises and is
concave, so that Newton's method converges from every side; from the left it never passes the root.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import InputError, ShapeError

_ITERATIONS = 200


def _checked(left: Tensor, right: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    if left.ndim != 2 or left.shape[1] != 3 or left.shape != right.shape:
        raise ShapeError(f"States are (n, 3), two of one shape; got {tuple(left.shape)} and {tuple(right.shape)}.")
    if not gamma > 1.0:
        raise InputError(f"gamma is above 1, got {gamma}.")
    both = torch.stack((left, right)).double()
    if not bool(torch.isfinite(both).all() & (both[..., ::2] > 0.0).all()):
        raise InputError("States are density, velocity and pressure, finite, density and pressure positive.")
    return both[0], both[1]


def _wave(p: Tensor, state: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """f_K and its derivative."""
    rho, _, p_K = state.unbind(1)
    c = (gamma * p_K / rho).sqrt()
    A, B = 2.0 / ((gamma + 1.0) * rho), (gamma - 1.0) / (gamma + 1.0) * p_K
    root = (A / (p + B)).sqrt()
    power = (p / p_K) ** ((gamma - 1.0) / (2.0 * gamma))
    shock = p > p_K
    value = torch.where(shock, (p - p_K) * root, 2.0 * c / (gamma - 1.0) * (power - 1.0))
    rise = torch.where(shock, root * (1.0 - 0.5 * (p - p_K) / (p + B)), power / p / (rho * c) * p_K)
    return value, rise


def riemann_star(
    left: Float[Tensor, "n 3"], right: Float[Tensor, "n 3"], *, gamma: float = 5.0 / 3.0
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Pressure and velocity between the outer waves, to rounding in float64.

    Parameters
    ----------
    left, right
        Density, velocity and pressure, in units that agree.
    gamma
        Ratio of specific heats, above 1.

    Returns
    -------
    tuple of Tensor
        p* and u*, float64.

    Raises
    ------
    ShapeError
        If the states are not (n, 3), two of one shape.
    InputError
        If a state is not one of a gas, or two move apart so fast that a vacuum opens between them.
    """
    left, right = _checked(left, right, gamma)
    apart = right[:, 1] - left[:, 1]
    c_left, c_right = ((gamma * s[:, 2] / s[:, 0]).sqrt() for s in (left, right))
    vacuum = 2.0 * (c_left + c_right) / (gamma - 1.0) <= apart
    if bool(vacuum.any()):
        case = int(vacuum.nonzero()[0])
        raise InputError(
            f"The states of case {case} move apart at {float(apart[case]):.4g} and a vacuum opens between them; the "
            f"difference of velocities must be below {float(2 * (c_left + c_right)[case] / (gamma - 1)):.4g}."
        )
    # Two rarefactions (4.46): exact where there are two, and below a shock's pressure times a factor of order one.
    k = (gamma - 1.0) / (2.0 * gamma)
    p = (
        (c_left + c_right - 0.5 * (gamma - 1.0) * apart) / (c_left / left[:, 2] ** k + c_right / right[:, 2] ** k)
    ) ** (1.0 / k)
    for _ in range(_ITERATIONS):
        (f_left, rise_left), (f_right, rise_right) = _wave(p, left, gamma), _wave(p, right, gamma)
        new = p - (f_left + f_right + apart) / (rise_left + rise_right)
        new = torch.maximum(new, 1e-3 * p)  # the first step, from the right, may pass zero
        done = bool(((new - p).abs() <= 1e-15 * new).all())
        p = new
        if done:
            break
    (f_left, rise_left), (f_right, rise_right) = _wave(p, left, gamma), _wave(p, right, gamma)
    u = 0.5 * (left[:, 1] + right[:, 1]) + 0.5 * (f_right - f_left)
    return p, u


def _side(state: Tensor, p_star: Tensor, u_star: Tensor, speed: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Solution left of the contact, at speeds (n, k), of the left state."""
    rho, u, p = (s[:, None] for s in state.unbind(1))
    p_star, u_star = p_star[:, None], u_star[:, None]
    g, c, ratio = (gamma - 1.0) / (gamma + 1.0), (gamma * p / rho).sqrt(), p_star / p
    # Shock (4.50 and 4.52).
    shock = u - c * ((gamma + 1.0) / (2.0 * gamma) * ratio + (gamma - 1.0) / (2.0 * gamma)).sqrt()
    behind = rho * (ratio + g) / (g * ratio + 1.0)
    # Rarefaction (4.53 to 4.56).
    adiabatic = rho * ratio ** (1.0 / gamma)
    head, tail = u - c, u_star - c * ratio ** ((gamma - 1.0) / (2.0 * gamma))
    inside = 2.0 / (gamma + 1.0) + g / c * (u - speed)
    fan = (
        rho * inside.clamp(min=0.0) ** (2.0 / (gamma - 1.0)),
        2.0 / (gamma + 1.0) * (c + 0.5 * (gamma - 1.0) * u + speed),
        p * inside.clamp(min=0.0) ** (2.0 * gamma / (gamma - 1.0)),
    )
    compressed = p_star > p
    outer = torch.where(compressed, speed < shock, speed < head)
    inner = compressed | (speed > tail)
    density = torch.where(outer, rho, torch.where(inner, torch.where(compressed, behind, adiabatic), fan[0]))
    velocity = torch.where(outer, u, torch.where(inner, u_star, fan[1]))
    pressure = torch.where(outer, p, torch.where(inner, p_star, fan[2]))
    return density, velocity, pressure


def riemann_solution(
    left: Float[Tensor, "n 3"], right: Float[Tensor, "n 3"], speed: Float[Tensor, " k"], *, gamma: float = 5.0 / 3.0
) -> Float[Tensor, "n 3 k"]:
    """Density, velocity and pressure on the rays x / t = speed, float64.

    Parameters
    ----------
    left, right, gamma
        As for `riemann_star`, which says what is raised.
    speed
        Distance from the first contact over time.
    """
    p_star, u_star = riemann_star(left, right, gamma=gamma)
    left, right = _checked(left, right, gamma)
    rays = speed.double().expand(len(left), -1)
    one = _side(left, p_star, u_star, rays, gamma)
    # The right side is a left one in a mirror.
    mirror = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64, device=left.device)
    two = _side(right * mirror, p_star, -u_star, -rays, gamma)
    first = rays <= u_star[:, None]
    pairs = zip(one, (two[0], -two[1], two[2]), strict=True)
    return torch.stack([torch.where(first, a, b) for a, b in pairs], 1)
