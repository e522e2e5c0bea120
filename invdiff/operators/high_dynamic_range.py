r"""High dynamic range: a camera that amplifies the contrast and clips what leaves its range.

    A(x) = clip(gain x - (gain - 1) / 2, 0, 1)

Zhang et al. (2025, arXiv 2407.01521) clip u = 2 x - 1 in [-1, 1]: v = clip(gain u, -1, 1) with gain 2. In [0, 1] that
is (v + 1) / 2 = clip((gain (2 x - 1) + 1) / 2, 0, 1), the formula above; clip(2 x - 1 / 2, 0, 1) for gain 2.
"""

from math import isfinite
from typing import final

from torch import Tensor

from invdiff.errors import InputError
from invdiff.kernels import pixelwise
from invdiff.operators.base import Operator
from invdiff.operators.separable import picture_shape


@final
class HighDynamicRange(Operator):
    """Contrast amplified about mid-grey and clipped to [0, 1], entry by entry.

    Entries of a picture below 1 / 2 - 1 / (2 gain) come out black and those above 1 / 2 + 1 / (2 gain) white. The
    gradient is the gain between the two and 0 outside, where only the prior knows more. A noise level published for
    [-1, 1] is half as large in [0, 1].

    Parameters
    ----------
    shape
        Shape (c, h, w) of inputs and outputs, pictures in [0, 1].
    gain
        Amplification of the contrast, positive; up to 1 nothing in [0, 1] is clipped.

    Raises
    ------
    ShapeError
        If the shape is not that of a picture.
    InputError
        If the gain is not positive and finite.
    """

    def __init__(self, shape: tuple[int, int, int], gain: float = 2.0) -> None:
        c, h, w = picture_shape(shape)
        if not gain > 0.0 or not isfinite(gain):
            raise InputError(f"The gain must be positive and finite, got {gain}; papers take 2.0.")
        super().__init__((c, h, w), (c, h, w))
        self.gain = float(gain)

    def forward(self, x: Tensor) -> Tensor:
        """Amplify and clip: (n, c, h, w) -> (n, c, h, w)."""
        return (self.gain * x - 0.5 * (self.gain - 1.0)).clamp(0.0, 1.0)

    def misfit_and_grad(self, x: Tensor, y: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Chi-square of the residuals and the log-density's gradient in one pass; see `invdiff.operators.Pixelwise`."""
        curve = pixelwise.Curve(self.gain, 0.5 * (self.gain - 1.0), 0.0, 1.0)
        chi2, grad = pixelwise.misfit(x.flatten(1), y.flatten(1), std, curve=curve)
        return chi2, grad.reshape(x.shape)
