r"""Blur with any 2-D kernel, as a true convolution: the kernel is flipped, not the picture.

    y[i] = sum_m w[m] x[i + k // 2 - m]

That is scipy.ndimage.convolve's definition for odd and even kernels alike, and the picture's physics: w is the image of
a point. Deep-learning "convolutions" are correlations; flip their kernels first.
"""

from math import prod
from typing import Literal, final

import torch
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.kernels import gaussian_misfit, plain, spectral_misfit
from invdiff.kernels.separable_stencil import Tables, separable_stencil, tables
from invdiff.operators.base import SVD, LinearOperator
from invdiff.operators.boundary import Axis, Boundary
from invdiff.operators.caches import Cache
from invdiff.operators.convolution import Method, choose, direct, direct_adjoint, fourier, fourier_adjoint, spectrum
from invdiff.operators.separable import KroneckerTables, picture_shape


@final
class Blur(LinearOperator):
    r"""Convolution of every channel with a kernel.

    Three methods give the same operator to rounding: "direct" (kh kw operations a pixel), "separable" (kernels of rank
    one: a stencil along each axis, or two dense matrix products for small pictures) and "fft" (transforms of 5-smooth
    lengths; of the picture's own size for "circular"). "auto" takes the cheapest by a measured cost model, for the
    device that it runs on: roughly direct up to 5 x 5, separable where the kernel is, else fft.

    The SVD is the Fourier transform for "circular", two small dense SVDs for kernels of rank one with any other
    boundary (some seconds for sides above 2000, once), else None. The proximal step is closed wherever there is an SVD.

    Parameters
    ----------
    kernel
        Point-spread function (kh, kw), or one a channel (c, kh, kw); any size, sign and sum, finite. A kernel that is
        of rank one to the rounding of its own dtype is taken as exactly that. A constant: no gradient flows into it.
    shape
        Shape (c, h, w) of one input. The operator follows its input's dtype, float32 or float64.
    boundary
        What lies outside the picture: "circular" repeats it; "reflect" mirrors it without repeating the edge pixel
        (torch's mode "reflect", scipy's "mirror"); "zero" is dark; "valid" keeps the (h - kh + 1, w - kw + 1) outputs
        that need no outside.
    method
        "auto", "direct", "separable" or "fft".

    Raises
    ------
    ShapeError
        If kernel and shape do not fit each other or the boundary.
    InputError
        If boundary or method is unknown, the kernel is not finite, or "separable" is asked of a kernel of higher rank.
    """

    kernel: Tensor

    def __init__(
        self,
        kernel: Tensor,
        shape: tuple[int, int, int],
        boundary: Boundary = "reflect",
        method: Literal["auto", "direct", "separable", "fft"] = "auto",
    ) -> None:
        c, h, w = picture_shape(shape)
        if kernel.ndim not in (2, 3) or 0 in kernel.shape or (kernel.ndim == 3 and len(kernel) not in (1, c)):
            raise ShapeError(
                f"The kernel must be (kh, kw) or ({c}, kh, kw) for shape {(c, h, w)}, got {tuple(kernel.shape)}."
            )
        if method not in ("auto", "direct", "separable", "fft"):
            raise InputError(f"method must be auto, direct, separable or fft, got {method!r}.")
        if kernel.is_complex() or not bool(torch.isfinite(kernel).all()):
            raise InputError("The kernel must be real and finite.")
        rows, columns = Axis(h, kernel.shape[-2], boundary), Axis(w, kernel.shape[-1], boundary)
        super().__init__((c, h, w), (c, rows.outputs, columns.outputs))
        self.boundary, self.method = boundary, method
        self._rows, self._columns = rows, columns
        values, self._rank_one = _round_rank_one(kernel.detach().reshape(-1, *kernel.shape[-2:]))
        if method == "separable" and not self._rank_one:
            raise InputError(
                "method='separable' needs a kernel of rank one (an outer product); use 'auto', 'direct' or 'fft'."
            )
        self.register_buffer("kernel", values)
        self._tables = Cache()

    def chosen_method(self, device: str | torch.device = "cpu") -> Method:
        """Return the method used on a device."""
        if self.method == "auto":
            return choose(self._rows, self._columns, self._rank_one, torch.device(device).type)
        return self.method

    def _kernel(self, dtype: torch.dtype) -> Tensor:
        return self._tables.get(self.kernel, ("kernel", dtype), lambda: self.kernel.to(dtype))

    def _spectra(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        def build() -> tuple[Tensor, Tensor]:
            h = spectrum(self.kernel.double(), self._rows, self._columns).to(dtype.to_complex())
            return h, h.conj().resolve_conj()

        return self._tables.get(self.kernel, ("spectra", dtype), build)

    def _sides(self) -> tuple[Tensor, Tensor]:
        u, s, vt = torch.linalg.svd(self.kernel.double())
        a, b = u[..., 0] * s[..., :1].sqrt(), vt[..., 0, :] * s[..., :1].sqrt()
        return self._rows.matrix(a), self._columns.matrix(b)

    def _matrices(self, dtype: torch.dtype) -> Tables:
        def build() -> Tables:
            return tables(*self._sides(), dtype, self.kernel.device)

        return self._tables.get(self.kernel, ("matrices", dtype), build)

    def forward(self, x: Tensor) -> Tensor:
        """Blur: (n, c, h, w) -> (n, c, outputs, outputs)."""
        method = self.chosen_method(x.device)
        if method == "separable":
            return separable_stencil(x, self._matrices(x.dtype))
        if method == "fft":
            return fourier(x, self._spectra(x.dtype), self._rows, self._columns)
        return direct(x, self._kernel(x.dtype), self._rows, self._columns)

    def adjoint(self, y: Tensor) -> Tensor:
        """Exact transpose, written out for every boundary: (n, c, outputs, outputs) -> (n, c, h, w)."""
        method = self.chosen_method(y.device)
        if method == "separable":
            return separable_stencil(y, self._matrices(y.dtype).mT)
        if method == "fft":
            return fourier_adjoint(y, self._spectra(y.dtype), self._rows, self._columns)
        return direct_adjoint(y, self._kernel(y.dtype), self._rows, self._columns)

    def misfit_and_grad(self, x: Tensor, y: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Chi-square of the residuals and the log-density's gradient; see `invdiff.operators.Pixelwise`.

        Of "circular" blurs by the Fourier transform, with noise of one level, without a transform between forward and
        adjoint.
        """
        circular = self.boundary == "circular" and self.chosen_method(x.device) == "fft"
        if circular and std.ndim == 0 and plain(std) and plain(y) and spectral_misfit.fused(x):
            spectra = torch.fft.rfft2(x), torch.fft.rfft2(y), self._spectra(x.dtype)[0]
            chi2, spectrum = spectral_misfit.misfit(*spectra, std, x.shape[-1])
            return chi2, torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="forward").contiguous()
        p = self.forward(x)
        chi2, cotangent = gaussian_misfit.misfit(p.flatten(1), y.flatten(1), std.reshape(-1))
        return chi2, self.adjoint(cotangent.reshape(p.shape))

    @property
    def svd(self) -> SVD | None:
        """Fourier for "circular" (complex coefficients), Kronecker for kernels of rank one, else None."""
        if self.boundary == "circular":
            return self._fourier_svd()
        if not self._rank_one:
            return None
        tables = self._tables.get(self.kernel, "svd", lambda: KroneckerTables(*self._sides()))
        return tables.svd(self.in_shape[0])

    def _fourier_svd(self) -> SVD:
        """Diagonalise A = F^H diag(h) F with the unitary F: V = F^H, S = |h|, U = F^H diag(h / |h|).

        The full transform, not its half, so that V and U are isometries of all coefficients. Where |h| is 0 to rounding
        the singular value is 0 and the phase is 1, so that U U^H = 1 holds at the spectrum's nulls too.
        """

        def build() -> tuple[Tensor, Tensor]:
            h = spectrum(self.kernel.double(), self._rows, self._columns, half=False)
            s = h.abs()
            null = s <= 8 * torch.finfo(torch.float64).eps * self.kernel.abs().sum((-2, -1), keepdim=True)
            return torch.where(null, 0.0, s), torch.where(null, 1.0, h / torch.where(null, 1.0, s))

        values, phases = self._tables.get(self.kernel, "svd", build)

        def phase(t: Tensor) -> Tensor:
            return self._tables.get(self.kernel, ("phase", t.dtype), lambda: phases.to(t.dtype))

        def v(c: Tensor) -> Tensor:
            x: Tensor = torch.fft.ifft2(c, norm="ortho").real
            return x

        def v_adjoint(x: Tensor) -> Tensor:
            c: Tensor = torch.fft.fft2(x, norm="ortho")
            return c

        def u(c: Tensor) -> Tensor:
            return v(phase(c) * c)

        def u_adjoint(y: Tensor) -> Tensor:
            c = v_adjoint(y)
            return phase(c).conj() * c

        return SVD(values.expand(self.in_shape), u, u_adjoint, v, v_adjoint)

    def prox(self, x: Tensor, y: Tensor, weight: float | Tensor) -> Tensor:
        """Proximal step, see `LinearOperator.prox`; for "circular" three transforms of the half spectrum."""
        if self.boundary != "circular":
            return super().prox(x, y, weight)
        h, conjugate = self._spectra(x.dtype)
        # A number stays one: as a tensor it would have to be copied to the device, which waits for all work there.
        w = weight.to(x).reshape(-1, 1, 1, 1) if isinstance(weight, Tensor) else float(weight)
        z = torch.fft.rfft2(x) + w * conjugate * torch.fft.rfft2(y)
        solution: Tensor = torch.fft.irfft2(z / (1.0 + w * h.abs() ** 2), s=x.shape[-2:])
        return solution


def _round_rank_one(kernel: Tensor) -> tuple[Tensor, bool]:
    """Return the kernel in float64, made exactly rank one where it is so to its own rounding, and whether it is."""
    own = kernel.dtype if kernel.is_floating_point() else torch.float64
    values = kernel.double()
    u, s, vt = torch.linalg.svd(values, full_matrices=False)
    tolerance = 4 * torch.finfo(own).eps * max(1, prod(kernel.shape[-2:]) ** 0.5)
    if s.shape[-1] > 1 and bool((s[..., 1] > tolerance * s[..., 0]).any()):
        return values.clone(), False
    return u[..., :1] * s[..., :1, None] @ vt[..., :1, :], True
