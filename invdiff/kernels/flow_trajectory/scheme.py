r"""The scheme that every version of the kernel follows: finite volumes of second order with HLLC fluxes.

Averages U = (rho, rho u, E) of density, momentum and energy in cells of width h, E = p / (gamma - 1) + rho u^2 / 2,
obey, with faces i + 1/2 between cells i and i + 1,

    dU_i/dt = -(F_{i+1/2} - F_{i-1/2}) / h,
    F_{i+1/2} = HLLC(W_i + s_i / 2, W_{i+1} - s_{i+1} / 2) - (0, tau, tau (u_i + u_{i+1}) / 2),
    tau = mu (u_{i+1} - u_i) / h,

where W = (rho, u, p) belongs to the averages, mu = zeta + 4 eta / 3, and no heat is conducted. So mass, momentum and
energy leave a cell only into its neighbour. The slopes are van Leer's (1974), for each primitive variable: with
differences a to the left and b to the right s = 2 a b / (a + b) where a b > 0, else 0. A value at a face lies between
those of the cells beside it, so density and pressure there are positive where the cells' are.

HLLC (Toro, Riemann Solvers and Numerical Methods for Fluid Dynamics, section 10.4) takes the speeds of Einfeldt et al.
(1991) with Roe's averages, S_L = min(u_L - c_L, u_Roe - c_Roe), S_R = max(u_R + c_R, u_Roe + c_Roe), with which a step
of first order keeps density and pressure positive (Batten et al. 1997), and

    S* = (p_R - p_L + m_L u_L - m_R u_R) / (m_L - m_R),   m_K = rho_K (S_K - u_K).

The side K is the left where S* >= 0. With S = min(S_L, 0) or max(S_R, 0), m = rho_K (S - u_K), p* = p_K + m (S* - u_K)
and v = S* / (S - S*), the flux is (m v, m v S* + p*, v ((S - u_K) E_K - p_K u_K + p* S)): the jump conditions written
so that it is the flux of side K where S = 0 (supersonic), and exactly (0, p, 0) at a contact at rest.

Beyond the ends the state is that of the last cell ("outflow"), of the other end ("periodic"), or mirrored with -u
("wall").

Time: the strong-stability-preserving Runge-Kutta method of second order (Gottlieb and Shu 1998). The time between two
outputs is made of equal steps. There are as few as keep a step times the rate of the fastest signal,
max_i (|u_i| + c_i + 2 mu / (rho_i h)) / h, within `START` at the first output. Where a later stage finds that product
above `LIMIT`, the part between the outputs is run again with steps for the rate it found. Each trajectory has steps of
its own, whatever batch it is in. A stage with density or pressure not positive ends a trajectory: those cells are NaN
at the next output (all cells, where a signal asks for `MOST` steps), and all cells after it.
"""

from math import ceil
from typing import Literal, get_args

Boundary = Literal["outflow", "periodic", "wall"]
BOUNDARIES: tuple[Boundary, ...] = get_args(Boundary)

LIMIT = 0.5
"""Largest product of step and signal rate: up to it each stage keeps the total variation of a scalar law."""
START = 0.4
"""The product that steps are chosen for."""
MOST = 1e6
"""Steps of one part at which a trajectory is given up."""


def steps_of_window(rate: float, window: float) -> int:
    """Return the steps of a window for a signal rate, at least one; one where they were `MOST` or more."""
    wanted = window * rate / START
    return max(1, ceil(wanted)) if wanted < MOST else 1
