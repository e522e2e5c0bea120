r"""A diffusion prior that works on wavelet coefficients and decodes by the inverse transform.

The unknown is an event of one or several variables, the latents z their normalised coefficients in one tensor, and
``x = W^{-1}(scale z + offset)`` with `invdiff.operators.wavelet_decoder`, an affine map, so that linear measurements
stay linear problems in z. The prior of z is any diffusion prior: a network, as in WDNO (Hu et al. 2025, ICLR), or a
Gaussian, for which posteriors are known in closed form.

What a problem gives is either a whole variable of the event, whose channels are then set to its coefficients in every
denoised state, or a named condition, such as an initial state, whose operator makes channels of it. Both are handed to
the prior of z by its own ``condition``, in latent units.
"""

import hashlib
from collections.abc import Mapping
from math import prod
from typing import Any, final

import torch
from torch import Tensor, nn

from invdiff.errors import CapabilityError, CatalogueError, ShapeError
from invdiff.event import Event, Variable, plain_event
from invdiff.operators.base import Operator, fingerprint
from invdiff.operators.wavelet import WaveletTransform
from invdiff.operators.wavelet_decoder import WaveletDecoder
from invdiff.priors.analytic import AnalyticPrior
from invdiff.priors.base import Curvature, DiffusionPrior, Sigma
from invdiff.priors.gaussian import GaussianPrior

_LARGEST_DENSE = 4096


@final
class WaveletPrior(nn.Module):
    r"""A diffusion prior of events through the wavelet coefficients of their variables.

    Parameters
    ----------
    prior
        Prior of the latents (channels, \*grid), in latent units; its own decoder is not used. With ``sample``,
        ``curvature``, ``log_prob`` or ``condition``, so has this one.
    decoder
        The way out; a transform stands for its decoder without scales on its own grid.
    event
        The unknown: variables of the decoder's names, order and shapes; where there are several, a single channel's
        axis may be left out. Numbered axes if None.
    conditions
        Operators from what may be given (states, parameters) to the latents' grid, (channels, \*grid), by name.

    Raises
    ------
    ShapeError
        If the prior's shape is not the decoder's, or the event's variables are not.
    """

    def __init__(
        self,
        prior: DiffusionPrior,
        decoder: WaveletDecoder | WaveletTransform,
        event: Event | None = None,
        *,
        conditions: Mapping[str, Operator] | None = None,
    ) -> None:
        super().__init__()
        decoder = WaveletDecoder(decoder) if isinstance(decoder, WaveletTransform) else decoder
        if tuple(prior.shape) != decoder.in_shape:
            raise ShapeError(f"The prior has shape {tuple(prior.shape)}, the decoder takes {decoder.in_shape}.")
        event = _plain(decoder) if event is None else tuple(event)
        # One variable may come out in another shape than its transform takes.
        shapes = (decoder.out_shape,) if len(decoder.names) == 1 else decoder.shapes
        theirs = list(zip(decoder.names, shapes, strict=True))
        ours = [(v.name, v.shape) for v in event]
        # Several variables stand flat behind one tensor, where an axis of one makes no difference.
        named = len(theirs) == 1 or [name for name, _ in ours] == [name for name, _ in theirs]
        agree = [s == t or (len(theirs) > 1 and _same(s, t)) for (_, s), (_, t) in zip(ours, theirs, strict=False)]
        if len(event) != len(theirs) or not named or not all(agree):
            raise ShapeError(f"The event has the variables {ours}, the decoder {theirs}; they must be the same.")
        self.prior, self.decoder, self._event = prior, decoder, event
        self.conditions = nn.ModuleDict(dict(conditions or {}))
        self.shape = tuple(prior.shape)
        self.name = f"wavelets of {getattr(prior, 'name', type(prior).__name__)}"
        self._known: dict[str, Tensor] = {}  # coefficients (channels, *grid) of given variables, by the decoder's name

    @property
    def event(self) -> Event:
        """The unknown in physical units."""
        return self._event

    @property
    def sigma_min(self) -> float:
        """Smallest noise level, latent units."""
        return float(self.prior.sigma_min)

    @property
    def sigma_max(self) -> float:
        """Largest noise level, latent units."""
        return float(self.prior.sigma_max)

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the prior of the latents, where it says so."""
        found: torch.dtype | None = getattr(self.prior, "dtype", None)
        return found

    @property
    def differentiable(self) -> bool:
        """Whether gradients pass through the denoiser."""
        return bool(getattr(self.prior, "differentiable", True))

    @property
    def curvature(self) -> Curvature | None:
        """That of the prior of the latents, or None."""
        found: Curvature | None = getattr(self.prior, "curvature", None)
        return found

    @property
    def key(self) -> str:
        """Hash of the prior of the latents, of the decoder, and of what is known."""
        inner = getattr(self.prior, "key", None)
        if inner is None:
            inner = fingerprint(self.prior) if isinstance(self.prior, nn.Module) else type(self.prior).__qualname__
        digest = hashlib.sha256(f"{inner}{fingerprint(self.decoder)}".encode())
        for name, value in sorted(self._known.items()):
            digest.update(name.encode() + value.detach().double().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def log_prob(self) -> Any:
        """Log-density of the noised latents, where their prior has one: z, sigma -> (n,), nats."""
        return self.prior.log_prob  # type: ignore[attr-defined]

    @property
    def sample(self) -> Any:
        """Draws of the latents, where their prior has them: n, seed -> (n, channels, ...)."""
        return self.prior.sample  # type: ignore[attr-defined]

    def denoise(self, z: Tensor, sigma: Sigma) -> Tensor:
        """E[z_0 | z_sigma = z, what is known], latent units; known variables' channels are what they are."""
        D = self.prior.denoise(z, sigma)
        if not self._known:
            return D
        parts = [
            self._known[name].to(D).expand(len(D), *D[:, channels].shape[1:]) if name in self._known else D[:, channels]
            for name, channels in self.decoder.channels.items()
        ]
        return torch.cat(parts, 1)

    def decode(self, z: Tensor) -> Tensor:
        """Physical units from latents: one variable in its shape, several flat, one after the other."""
        x: Tensor = self.decoder(z)
        return x

    def encode(self, x: Tensor) -> Tensor:
        """Latents from physical units; of all latents that decode to x those of the forward transform."""
        return self.decoder.inverse(x)

    def condition(self, given: Mapping[str, Tensor]) -> "WaveletPrior":
        r"""Give the same prior with something known.

        Parameters
        ----------
        given
            By name: whole variables of the event, or inputs (\*in_shape) of `conditions`; physical units. With one axis
            more, (n, ...), they are rows: each of n latents has its own, and only n of them are denoised together.
            Gradients pass through what is given.

        Raises
        ------
        CatalogueError
            If a name is neither; the message holds the nearest ones.
        ShapeError
            If values have another shape.
        CapabilityError
            If the prior of the latents has no ``condition``.
        """
        names = dict(zip([v.name for v in self._event], self.decoder.names, strict=True))
        latents, known = {}, dict(self._known)
        for name, value in given.items():
            if name not in names and name not in self.conditions:
                raise CatalogueError.unknown("variable or condition of the prior", name, [*names, *self.conditions])
            operator = None if name in names else self.conditions[name]
            wanted: Any = self._event[list(names).index(name)].shape if operator is None else operator.in_shape
            shape = tuple(wanted)
            one = _same(tuple(value.shape), shape)
            if not one and not (value.ndim > 0 and _same(tuple(value.shape[1:]), shape)):
                raise ShapeError(
                    f"The given {name!r} has shape {tuple(value.shape)}, needed is {shape}, or rows of it."
                )
            if operator is None:
                inner = names[name]
                whole = value.reshape(-1, *self.decoder.shapes[self.decoder.names.index(inner)])
                rows = self.decoder.encode(inner, whole)[:, self.decoder.channels[inner]]
                known[inner] = rows[0] if one else rows
                latents[name] = known[inner]
            else:
                rows = operator(value.reshape(-1, *shape))
                latents[name] = rows[0] if one else rows
        condition = getattr(self.prior, "condition", None)
        if condition is None:
            raise CapabilityError(
                f"{type(self.prior).__name__} has no condition(given), so it cannot be told of {sorted(given)}; use "
                "priors.ConditionalPrior, or a Gaussian whose event names the variables."
            )
        operators: dict[str, Any] = dict(self.conditions.items())
        other = WaveletPrior(condition(latents), self.decoder, self._event, conditions=operators)
        other._known = known
        return other


def _same(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two shapes are the same but for a single channel that one of them leaves out."""
    return one == other or (1, *one) == other or one == (1, *other)


def _plain(decoder: WaveletDecoder) -> Event:
    """Numbered axes, but for one picture."""
    if len(decoder.names) == 1:
        return plain_event(decoder.out_shape)
    return tuple(_numbered(name, shape) for name, shape in zip(decoder.names, decoder.shapes, strict=True))


def _numbered(name: str, shape: tuple[int, ...]) -> Variable:
    return Variable(name=name, dims=tuple(f"{name}_dim_{i}" for i in range(len(shape))), shape=shape)


def gaussian_wavelet_prior(
    law: AnalyticPrior, decoder: WaveletDecoder | WaveletTransform, event: Event | None = None
) -> WaveletPrior:
    """Make the wavelet prior of a Gaussian law of events, exact: what a network of coefficients would learn of it.

    For ``x ~ N(m, C)`` the latents ``z = E x + e`` of the forward transform are Gaussian with mean ``E m + e`` and
    covariance ``E C E^T``, which has no variance in the padding and, where there are more coefficients than values,
    in the directions that no event has. Posteriors of x are those of the law itself.

    Parameters
    ----------
    law
        A `GaussianPrior` or `FieldPrior` of the event, physical units, for at most 4096 latents; its own latents are
        taken as x, so its decoder must be the identity.
    decoder, event
        As for `WaveletPrior`.

    Raises
    ------
    CapabilityError
        If the law is not Gaussian.
    ShapeError
        If the law's events are not what the decoder gives, or there are too many latents.
    """
    decoder = WaveletDecoder(decoder) if isinstance(decoder, WaveletTransform) else decoder
    mean, covariance = getattr(law, "mean", None), getattr(law, "covariance", None)
    if not isinstance(mean, Tensor) or not isinstance(covariance, Tensor) or hasattr(law, "weights"):
        raise CapabilityError(f"{type(law).__name__} is not a Gaussian with a mean and a covariance.")
    size, d = prod(decoder.out_shape), prod(decoder.in_shape)
    if mean.numel() != size or d > _LARGEST_DENSE:
        raise ShapeError(
            f"The law has {mean.numel()} values and the decoder gives {size} from {d} latents; the former must agree, "
            f"the latter be at most {_LARGEST_DENSE}."
        )
    with torch.no_grad():
        zero = decoder.inverse(mean.new_zeros(1, *decoder.out_shape))
        basis = torch.eye(size, dtype=mean.dtype, device=mean.device).reshape(size, *decoder.out_shape)
        E = (decoder.inverse(basis) - zero).flatten(1).mT
        C = E @ covariance @ E.mT
        latents = tuple(
            _numbered(name, (channels.stop - channels.start, *decoder.in_shape[1:]))
            for name, channels in decoder.channels.items()
        )
        inner = GaussianPrior(
            decoder.inverse(mean.reshape(1, *decoder.out_shape))[0], 0.5 * (C + C.mT), decoder.in_shape, event=latents
        )
    return WaveletPrior(inner, decoder, event)
