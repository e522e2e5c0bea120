"""The response of one pixel."""

from dataclasses import dataclass
from math import inf
from typing import final


@final
@dataclass(frozen=True)
class Curve:
    """``clip(gain x - offset, low, high)``; its slope is the gain on [low, high] and 0 outside.

    Parameters
    ----------
    gain, offset, low, high
        In the units of the measurement, the gain in those over the picture's; low and high may be infinite.
    """

    gain: float = 1.0
    offset: float = 0.0
    low: float = -inf
    high: float = inf
