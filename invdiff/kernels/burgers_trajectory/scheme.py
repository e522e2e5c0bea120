r"""The scheme that every version of the kernel follows: finite volumes and Runge-Kutta, both of fourth order.

Cell averages U_i of width h obey, with faces i + 1/2 between cells i and i + 1,

    dU_i/dt = -(q_{i+1/2} - q_{i-1/2}) / h + f_i,     q = v^2 / 2 - nu g,
    v = (-U_{i-1} + 7 U_i + 7 U_{i+1} - U_{i+2}) / 12,     g = (U_{i-1} - 15 U_i + 15 U_{i+1} - U_{i+2}) / (12 h),

so that what leaves a cell enters its neighbour. At walls with u = 0 the state is continued oddly,
which is the symmetry of the equation; at periodic ends, periodically. A window of constant forcing is made of equal
steps of the classical Runge-Kutta method, as many as stability asks for given the largest speed that the window can
see, max |U| + window max |f|: each trajectory has steps of its own, whatever batch it is in.

The spectrum of the right-hand side lies within 16 nu / (3 h^2) along the negative real axis and 1.37 |u| / h along the
imaginary one, and the method's region of stability reaches to 2.78 and 2.83; an ellipse between the two, with a margin,
says how many steps there must be.
"""

from math import ceil, hypot

REAL, IMAGINARY = 16.0 / 3.0 / 2.78, 1.3722 / 2.83
MARGIN = 0.9
"""Share of the largest stable step that is taken."""


def least_rate(speed: float, h: float, nu: float) -> float:
    """Fewest steps in a unit of time that are stable, for speeds up to `speed`."""
    return hypot(REAL * nu / (h * h), IMAGINARY * speed / h)


def steps_of_window(speed: float, h: float, nu: float, window: float) -> int:
    """Return the steps of a window: the fewest stable ones with a margin, at least one."""
    return max(1, ceil(window * least_rate(speed, h, nu) / MARGIN))
