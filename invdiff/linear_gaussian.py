"""The linear-Gaussian problem in latent units, and the solutions that samplers ask of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import log, pi, prod, sqrt

import torch
from torch import Tensor

from invdiff.errors import CapabilityError
from invdiff.likelihoods import Gaussian, Likelihood
from invdiff.operators.base import SVD, LinearOperator, Operator
from invdiff.operators.composition import Affine, LinearComposition, Shifted
from invdiff.operators.solvers import Graphs, conjugate_gradient
from invdiff.priors.base import Curvature, half_multiplicity


@dataclass(frozen=True)
class Sphere(Curvature):
    """A covariance sigma^2 * identity, and the Fourier basis, in which blurs and samplings are nearly diagonal.

    Parameters
    ----------
    shape
        Shape of one event; its first axis, the channels, is left alone where there are others.
    """

    shape: tuple[int, ...]

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(range(-max(1, len(self.shape) - 1), 0))

    def to_basis(self, z: Tensor) -> Tensor:
        """Orthonormal Fourier coefficients, the half that a real event needs."""
        coefficients: Tensor = torch.fft.rfftn(z, dim=self._axes, norm="ortho")
        return coefficients

    def from_basis(self, c: Tensor) -> Tensor:
        """Inverse of `to_basis`."""
        z: Tensor = torch.fft.irfftn(c, s=[self.shape[a] for a in self._axes], dim=self._axes, norm="ortho")
        return z

    @property
    def multiplicity(self) -> Tensor:
        """Two for a coefficient that stands for its conjugate too."""
        return half_multiplicity(self.shape[-1])

    def variance(self, sigma: float) -> Tensor:
        """Return sigma^2."""
        return torch.tensor(sigma**2, dtype=torch.float64)


@dataclass(frozen=True)
class LinearGaussian:
    r"""``y = A z + noise_std * eps`` in latent units, with A the measurement operator after the prior's decoder.

    Parameters
    ----------
    operator
        A, from latent units to the measurement's.
    measurement
        Measurements less the decoder's offset, (problems, \*out_shape), or one a row after `rows`.
    noise_std
        Scalar or diagonal, measurement's units, float64.
    tables
        What was measured of the operator for `correction`, by basis; shared by all `rows`.
    numbers
        What was worked out as a number, which a GPU is waited for; shared by all `rows`.
    graphs
        Iterations of `correction` on a GPU, by basis; shared by all `rows`.
    """

    operator: LinearOperator
    measurement: Tensor
    noise_std: Tensor
    tables: dict[Curvature, Tensor] = field(default_factory=dict, repr=False, compare=False)
    numbers: dict[str, float] = field(default_factory=dict, repr=False, compare=False)
    graphs: dict[Curvature, Graphs] = field(default_factory=dict, repr=False, compare=False)

    @property
    def scalar_variance(self) -> float | None:
        """R where it is a scalar, else None."""
        return self.least_noise_std**2 if self.noise_std.ndim == 0 else None

    @property
    def least_noise_std(self) -> float:
        """Smallest standard deviation of the noise; worked out once."""
        if "noise" not in self.numbers:
            self.numbers["noise"] = float(self.noise_std.min())
        return self.numbers["noise"]

    @property
    def has_svd(self) -> bool:
        """Whether functions of A A^T + R are closed forms: an SVD of A, and scalar R."""
        return self.noise_std.ndim == 0 and self.operator.svd is not None

    def needed_svd(self) -> SVD:
        """Return the operator's SVD.

        Raises
        ------
        CapabilityError
            If it has none.
        """
        if self.operator.svd is None:
            raise CapabilityError(f"{type(self.operator).__name__} has no SVD, in whose basis this sampler works.")
        return self.operator.svd

    def rows(self, index: Tensor) -> "LinearGaussian":
        """Return the problem whose row i holds measurement ``index[i]``."""
        y = self.measurement if len(self.measurement) == 1 else self.measurement[index]
        return LinearGaussian(self.operator, y, self.noise_std, self.tables, self.numbers, self.graphs)

    def residual(self, z: Tensor) -> Tensor:
        """Y - A z for z of shape (n, *shape)."""
        return self.measurement.to(z.dtype) - self.operator(z)

    def solve(
        self,
        r: Tensor,
        covariance: Callable[[Tensor], Tensor] | float,
        *,
        rtol: float | None = None,
        max_iterations: int = 500,
    ) -> Tensor:
        """(R + A C A^T)^{-1} r.

        Parameters
        ----------
        r
            Residuals (n, *out_shape).
        covariance
            v -> C v on (n, *shape), symmetric and positive; or a float c for C = c * identity (a closed form with an
            SVD).
        rtol, max_iterations
            Of the conjugate gradients, where they are needed.
        """
        A, variance = self.operator, (self.noise_std**2).to(r.dtype)
        if isinstance(covariance, (int, float)):
            c = float(covariance)
            if self.has_svd and A.svd is not None:
                return A.svd.outer(lambda s2: 1.0 / (variance + c * s2), r)
            return conjugate_gradient(
                lambda v: variance * v + c * A(A.adjoint(v)), r, rtol=rtol, max_iterations=max_iterations
            )
        apply = covariance
        return conjugate_gradient(
            lambda v: variance * v + A(apply(A.adjoint(v))), r, rtol=rtol, max_iterations=max_iterations
        )

    def correction(
        self,
        r: Tensor,
        curvature: Curvature,
        sigma: float,
        *,
        start: Tensor | None = None,
        atol: float | None = None,
        max_iterations: int = 400,
    ) -> Tensor:
        """C A^T (R + A C A^T)^{-1} r, with C the curvature's covariance at sigma.

        It is the x that solves (C^{-1} + A^T R^{-1} A) x = A^T R^{-1} r, by conjugate gradients with the diagonal of
        that matrix in the curvature's basis as the preconditioner: a few iterations for operators that are nearly
        diagonal there, as a blur in the Fourier basis is for any boundary.

        Parameters
        ----------
        r
            Residuals (n, *out_shape).
        curvature, sigma
            Error covariance of the denoiser, and where it is taken.
        start
            First guess (n, *shape), such as the correction at the last level; zero if None.
        atol
            Root-mean-square error of the result in units of the standard deviation of z_0 given z_sigma and y; 1e-3
            in float32 and 1e-11 in float64 if None, since a solution cut short answers to the last bit of its input
            with a share of its tolerance.
        max_iterations
            Bound on the iterations.
        """
        atol = (1e-11 if r.dtype == torch.float64 else 1e-3) if atol is None else atol
        A, variance = self.operator, (self.noise_std**2).to(r.dtype)
        c = curvature.variance(sigma).to(r)
        inverse = 1.0 / c.clamp_min(1e-12 * c.max())  # values that the prior fixes stay fixed
        diagonal = inverse + self._gram_diagonal(curvature).to(r)
        often = curvature.multiplicity

        # In the curvature's basis, where C is diagonal: two changes of basis an iteration.
        def precision(x: Tensor, inverse: Tensor, diagonal: Tensor, variance: Tensor) -> Tensor:  # noqa: ARG001
            return inverse * x + curvature.to_basis(A.adjoint(A(curvature.from_basis(x)) / variance))

        def precondition(x: Tensor, inverse: Tensor, diagonal: Tensor, variance: Tensor) -> Tensor:  # noqa: ARG001
            return x / diagonal

        x = conjugate_gradient(
            precision,
            curvature.to_basis(A.adjoint(r / variance)),
            inverse,
            diagonal,
            variance,
            start=None if start is None else curvature.to_basis(start),
            precondition=precondition,
            multiplicity=None if often is None else often.to(r),
            rtol=0.0,
            atol=atol * sqrt(prod(A.in_shape)),
            max_iterations=max_iterations,
            graphs=self.graphs.setdefault(curvature, Graphs()),
        )
        return curvature.from_basis(x)

    def gain(self, r: Tensor, variance: float, *, atol: float | None = None, max_iterations: int = 400) -> Tensor:
        """C A^T (R + C A A^T)^{-1} r for a covariance C = variance * identity.

        Added to x it gives the proximal point ``argmin_z |y - A z|^2 / (2 R) + |z - x|^2 / (2 C)`` when r = y - A x,
        and a draw of ``N(z; x, C) p(y | z)`` when x and r are perturbed by their own noise (Papandreou & Yuille 2010).
        In closed form with an SVD, else by the conjugate gradients of `correction`.

        Parameters
        ----------
        r
            Residuals (n, *out_shape).
        variance
            C, positive, latent units squared.
        atol, max_iterations
            As in `correction`, but 1e-13 in float64: alternating samplers put it through many levels.
        """
        if self.has_svd:
            return variance * self.operator.adjoint(self.solve(r, variance))
        atol = 1e-13 if atol is None and r.dtype == torch.float64 else atol
        sphere = Sphere(self.operator.in_shape)
        return self.correction(r, sphere, sqrt(variance), atol=atol, max_iterations=max_iterations)

    def information(self, v: Tensor, extra: float = 0.0) -> Tensor:
        """A^T (R + extra A A^T)^{-1} A v: curvature of the likelihood of a measurement with more noise in it.

        Where there is no closed form, A A^T is replaced by its bound ||A||^2, as on the path `potential.Noised`.

        Parameters
        ----------
        v
            Events (n, *shape).
        extra
            kappa sigma^2, latent units squared.
        """
        A, w = self.operator, self.operator(v)
        if extra and self.has_svd and A.svd is not None:
            R = (self.noise_std**2).to(v)
            return A.adjoint(A.svd.outer(lambda s2: 1.0 / (R + extra * s2), w))
        return A.adjoint(w / (self.noise_std**2 + (extra * self.norm() ** 2 if extra else 0.0)).to(v))

    def information_diagonal(self, curvature: Curvature, extra: float = 0.0, probes: int = 16) -> Tensor:
        """Diagonal of `information` in the curvature's basis, by random signs (Bekas et al. 2007); not negative."""
        A, like = self.operator, self.measurement
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (probes, *A.in_shape), generator=generator) * 2 - 1
        v = signs.to(device=like.device, dtype=like.dtype)
        V, W = curvature.to_basis(v), curvature.to_basis(self.information(v, extra))
        power = (V.abs() ** 2).sum(0)
        diagonal = (W * V.conj()).real.sum(0) / torch.maximum(power, 1e-6 * power.max())
        return diagonal.clamp_min(0.0)

    def log_evidence(self, center: Tensor, variance: float, extra: float = 0.0) -> Tensor | None:
        """Log N(y; A center, R + (extra + variance) A A^T), float64, one value a measurement.

        It is the evidence of a prior N(center, variance * identity), center (*shape), under the likelihood whose
        curvature is `information`; None where it needs a determinant of more than 2048 measured values without an SVD.
        """
        A = self.operator
        r = self.residual(center[None]).double()
        size = prod(A.out_shape)
        if self.has_svd and A.svd is not None:
            R, c = self.noise_std.double() ** 2, variance + extra
            s2 = A.svd.singular_values.double().to(R.device) ** 2
            log_det = size * R.log() + torch.log1p(c / R * s2).sum()
            w = A.svd.outer(lambda t: 1.0 / (R + c * t), r)
        elif size <= 2048:
            basis = torch.eye(size, dtype=self.measurement.dtype, device=r.device).reshape(size, *A.out_shape)
            gram = A(A.adjoint(basis)).reshape(size, size).double()
            noise = torch.broadcast_to(self.noise_std.double() ** 2, A.out_shape).flatten() + extra * self.norm() ** 2
            L = torch.linalg.cholesky(0.5 * variance * (gram + gram.mT) + noise.diag())
            log_det = 2.0 * L.diagonal().log().sum()
            w = torch.cholesky_solve(r.reshape(len(r), size).mT, L).mT.reshape(r.shape)
        else:
            return None
        return -0.5 * ((r * w).flatten(1).sum(1) + log_det + size * log(2.0 * pi))

    def norm(self) -> float:
        """Largest singular value of A; worked out once."""
        if "norm" not in self.numbers:
            self.numbers["norm"] = float(self.operator.norm())
        return self.numbers["norm"]

    def _gram_diagonal(self, curvature: Curvature) -> Tensor:
        """Diagonal of A^T R^{-1} A in the curvature's basis; measured once."""
        if curvature not in self.tables:
            self.tables[curvature] = self.information_diagonal(curvature)
        return self.tables[curvature]


def linear_gaussian(likelihood: Likelihood, decoder: Operator | None) -> LinearGaussian | None:
    """Return the linear-Gaussian problem in latent units, A after the decoder, or None where it is not one."""
    if (
        not isinstance(likelihood, Gaussian)
        or not isinstance(likelihood.operator, LinearOperator)
        or likelihood.measurement.is_complex()
    ):
        return None
    A, y = likelihood.operator, likelihood.measurement
    if isinstance(decoder, Affine):
        if decoder.offset:
            y = y - A(torch.full((1, *A.in_shape), decoder.offset, dtype=y.dtype, device=y.device))
        decoder = None if decoder.scale == 1.0 else decoder.linear
    if isinstance(decoder, Shifted):
        y, decoder = y - A(decoder.offset[None].to(y)), decoder.linear
    if decoder is None:
        return LinearGaussian(A, y, likelihood.noise_std)
    if isinstance(decoder, LinearOperator):
        return LinearGaussian(LinearComposition(A, decoder), y, likelihood.noise_std)
    return None
