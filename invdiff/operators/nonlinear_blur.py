r"""Non-linear blur: camera shake as a camera records it, in linear light that saturates and is gamma-encoded.

    A(x) = encode(saturate(exposure * (k * linearise(x))))

with k a motion kernel, ``*`` before linearise the convolution of `Blur`, and

    linearise(x) = ((x + a) / (1 + a))^gamma   for x > t, a = (gamma - 1) t;   s x for x <= t, negative x included
    saturate(e)  = 1 - softplus((1 - e) / knee) / softplus(1 / knee)
    encode(l)    = (1 + a) l^(1 / gamma) - a   for l > s t;   l / s for l <= s t,   the inverse of linearise

where t = 0.04 and s = ((t + a) / (1 + a))^gamma / t. The straight toe and the power meet at t with one slope, as in
sRGB, whose curve this is for gamma = 2.4 (a = 0.056 for 0.055): a pure power has the slope 0 at black and its inverse
an infinite one, and no gradient survives their product. saturate is close to the identity where e is some knees below
1, maps 0 to 0 and tends to 1.

Light adds up, pixel values do not: blur in linear light is how Nah et al. (2017, arXiv 1612.02177) make blurred
pictures, with gamma = 2.2. The operator published under this name (Tran et al. 2021, arXiv 2104.00317, as used in arXiv
2209.14687) is a trained network fed with a random code that is drawn anew at every call, so that measurement and
guidance disagree about the blur. Here the kernel is drawn once, from a seed, and kept as a buffer; a call draws
nothing.
"""

from math import isfinite
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from invdiff.errors import InputError
from invdiff.operators.base import Operator
from invdiff.operators.blur import Blur
from invdiff.operators.boundary import Boundary
from invdiff.operators.kernels import motion_kernel
from invdiff.operators.separable import picture_shape

_TOE = 0.04  # Pixel value below which the camera's curve is straight.


@final
class NonlinearBlur(Operator):
    """Camera shake in linear light, with saturation and gamma encoding; see the file's head for the formula.

    Pictures in [0, 1] give outputs in [0, 1]. Values and gradients are finite and the curves strictly rising for every
    real input, though slopes vanish in rounding far above saturation.

    Parameters
    ----------
    shape
        Shape (c, h, w) of one input, a picture in [0, 1].
    seed
        Seed of the motion kernel; the same kernel on every device.
    size
        Samples of the kernel an axis, at least 3; if None, the odd number nearest to 61 / 256 of the shorter side: 15
        for 64 pixels, 61 for 256.
    intensity
        Shakiness of the motion in [0, 1].
    kernel
        A kernel (kh, kw), or one a channel (c, kh, kw), in place of the drawn one: finite, not negative, not all 0;
        kept as it is. seed, size and intensity are then without effect.
    gamma
        Exponent of the encoding, at least 1, which is none.
    exposure
        Amplification of the light before saturation, positive: above 1 bright regions saturate.
    knee
        Width of the passage into saturation in units of full light, positive.
    boundary
        As for `Blur`; "valid" gives smaller outputs.

    Raises
    ------
    ShapeError
        If the kernel does not fit the shape or the boundary.
    InputError
        If a setting is out of its range.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        seed: int = 0,
        *,
        size: int | None = None,
        intensity: float = 0.5,
        kernel: Tensor | None = None,
        gamma: float = 2.2,
        exposure: float = 1.5,
        knee: float = 0.1,
        boundary: Boundary = "reflect",
    ) -> None:
        c, h, w = picture_shape(shape)
        if not (gamma >= 1.0 and exposure > 0.0 and knee > 0.0) or not all(map(isfinite, (gamma, exposure, knee))):
            raise InputError(
                "NonlinearBlur needs finite gamma >= 1, exposure > 0 and knee > 0, "
                f"got gamma={gamma}, exposure={exposure}, knee={knee}."
            )
        if kernel is None:
            if size is None:
                size = max(3, 2 * round((61 / 256 * min(h, w) - 1) / 2) + 1)
            kernel = motion_kernel(size, intensity, seed)
        elif not kernel.is_complex() and (bool((kernel < 0).any()) or not bool((kernel > 0).any())):
            raise InputError("The kernel holds times of exposure: none may be negative, and not all may be zero.")
        blur = Blur(kernel, (c, h, w), boundary)
        super().__init__(blur.in_shape, blur.out_shape)
        self.gamma, self.exposure, self.knee = float(gamma), float(exposure), float(knee)
        self.blur = blur
        self._a = (self.gamma - 1.0) * _TOE
        self._slope = ((_TOE + self._a) / (1.0 + self._a)) ** self.gamma / _TOE

    def linearise(self, x: Tensor) -> Tensor:
        """Light of pixel values; 0 and 1 stay."""
        # The clamp keeps the power's gradient finite where the other branch is taken.
        power = ((x.clamp_min(_TOE) + self._a) / (1.0 + self._a)) ** self.gamma
        return torch.where(x > _TOE, power, self._slope * x)

    def saturate(self, light: Tensor) -> Tensor:
        """Light that the sensor holds: 0 stays, much light tends to 1."""
        # softplus(v) = -logsigmoid(-v), which unlike torch's softplus has no threshold and so no step.
        black = logsigmoid(light.new_full((), -1.0 / self.knee))
        return 1.0 - logsigmoid((light - 1.0) / self.knee) / black

    def encode(self, light: Tensor) -> Tensor:
        """Pixel values of light, the inverse of `linearise`."""
        edge = self._slope * _TOE
        power = (1.0 + self._a) * light.clamp_min(edge) ** (1.0 / self.gamma) - self._a
        return torch.where(light > edge, power, light / self._slope)

    def forward(self, x: Tensor) -> Tensor:
        """Picture that the shaken camera takes: (n, c, h, w) -> (n, c, outputs, outputs)."""
        return self.encode(self.saturate(self.exposure * self.blur(self.linearise(x))))
