r"""Phase retrieval: the magnitude of the oversampled Fourier transform, as a detector far from the object sees it.

    A(x) = |F pad(low + (high - low) x)|

F is the orthonormal two-dimensional transform of every channel, and pad puts a dark margin round the picture. A is even
in the mapped picture and loses its place: different pictures give the same measurement.

References
----------
Chung et al. 2023, "Diffusion posterior sampling for general noisy inverse problems", arXiv 2209.14687.
Zhang et al. 2025, "Improving diffusion inverse problem solving with decoupled noise annealing", arXiv 2407.01521.
Hayes 1982, "The reconstruction of a multidimensional sequence from the phase or magnitude of its Fourier transform",
IEEE Trans. ASSP 30(2), 140-154.
"""

from math import isfinite
from typing import final

import torch
from torch import Tensor

from invdiff.errors import InputError
from invdiff.kernels import fourier_magnitude, gaussian_misfit
from invdiff.operators.base import Operator
from invdiff.operators.separable import picture_shape


@final
class PhaseRetrieval(Operator):
    r"""Fourier magnitudes of every channel of a picture with a dark margin; zero frequency in the centre.

    What the magnitudes leave open, for each channel apart: the sign of the mapped picture, its rotation by 180 degrees
    (in place), and its shift as far as the picture's own dark border allows: none where it is bright on all four edges,
    but any cyclic one where there is no margin.
    Hayes (1982) shows that almost all pictures have no other ambiguity where every axis is sampled at 2 side - 1 or
    more frequencies, which is ``oversampling >= 4``; the published 2.0 takes 1.5 side. Pixels in [0, 1] with the range
    (0, 1) exclude the sign, but with the range (-1, 1) it is the negative, 1 - x, and as plausible as x. Nothing but
    the prior tells colours rotated apart from colours rotated together. A posterior therefore has several modes. To
    choose among its draws by the truth, as the published best of four runs does, is no estimate: benchmarks score every
    draw as it is.

    Every frequency but a few is measured twice, at k and -k, as in the published tasks; the noise of the two differs,
    so together they are one measurement with half the variance.

    Parameters
    ----------
    shape
        Shape (c, h, w) of one input. Outputs are (c, h + 2 p, w + 2 q) with p = int(oversampling / 8 * h) and
        q = int(oversampling / 8 * w): 384 x 384 for 256 x 256 and 2.0.
    oversampling
        Width of the margin, see there; 0 gives none.
    pixel_range
        (low, high) that 0 and 1 of a picture are mapped to before the margin, which is 0 in that range. (0, 1), DAPS's
        choice, is the picture's own brightness in a dark surrounding; (-1, 1) is DPS's, in a mid-grey one. A noise
        level is in the units of this range: the same number is twice as much for (0, 1).

    Raises
    ------
    ShapeError
        If the shape is not that of a picture.
    InputError
        If oversampling is negative or not finite, or the range is empty or not finite.
    """

    def __init__(
        self, shape: tuple[int, int, int], oversampling: float = 2.0, *, pixel_range: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        c, h, w = picture_shape(shape)
        if not 0.0 <= oversampling < float("inf"):
            raise InputError(f"oversampling must be finite and not negative, got {oversampling}; papers take 2.0.")
        if len(pixel_range) != 2 or not all(map(isfinite, pixel_range)) or not pixel_range[0] < pixel_range[1]:
            raise InputError(f"pixel_range must be (low, high) with low < high, e.g. (0, 1), got {pixel_range}.")
        p, q = int(oversampling / 8 * h), int(oversampling / 8 * w)
        super().__init__((c, h, w), (c, h + 2 * p, w + 2 * q))
        self.oversampling, self.pixel_range = float(oversampling), (float(pixel_range[0]), float(pixel_range[1]))

    def forward(self, x: Tensor) -> Tensor:
        """Magnitudes: (n, c, h, w) -> (n, c, h + 2 p, w + 2 q). The gradient is 0 where a magnitude is 0."""
        if fourier_magnitude.fused(x):
            return fourier_magnitude.magnitudes(self._half(x, "backward"), self.out_shape[-1])
        # |F(-k)| = |F(k)| for a real picture gives the other half, at a third of a full transform's cost.
        return fourier_magnitude.whole(self._half(x, "ortho").abs(), self.out_shape[-1])

    def misfit_and_grad(self, x: Tensor, y: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Chi-square of the residuals and the log-density's gradient; see `invdiff.operators.Pixelwise`.

        Two transforms and one pass over the spectrum between them.
        """
        if fourier_magnitude.fused(x):
            chi2, spectrum = fourier_magnitude.misfit(self._half(x, "backward"), y, std)
            grad = torch.fft.irfft2(spectrum, s=self.out_shape[-2:], norm="forward")
            grad = grad[..., : x.shape[-2], : x.shape[-1]]
        else:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                p = self.forward(leaf)
            rows = std.reshape(-1)
            chi2, cotangent = gaussian_misfit.misfit(p.detach().flatten(1), y.flatten(1), rows)
            (grad,) = torch.autograd.grad(p, leaf, cotangent.reshape(p.shape))
            return chi2, grad
        low, high = self.pixel_range
        return chi2, grad * (high - low) if high - low != 1.0 else grad.contiguous()

    def _half(self, x: Tensor, norm: str) -> Tensor:
        """Half of the transform of the mapped pictures."""
        low, high = self.pixel_range
        # The whole margin at the end of either axis: a shift, which magnitudes do not see.
        mapped = x if (low, high) == (0.0, 1.0) else low + (high - low) * x
        half: Tensor = torch.fft.rfft2(mapped, s=self.out_shape[-2:], norm=norm)
        return half
