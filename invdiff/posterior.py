"""The posterior: a problem and a prior together, and all that a sampler sees.

Every method takes states with any leading axes, (n, *shape) or (ensemble, particle, *shape), problem-major: with p
problems, the first 1/p of the particles belong to the first problem. The posterior alone splits work into micro-batches
and counts evaluations.
"""

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from invdiff import driver
from invdiff.driver import Budget, Callback, Sampler
from invdiff.errors import CapabilityError, InputError, SamplingError, ShapeError
from invdiff.event import Event, check_agreement, plain_event
from invdiff.likelihoods import Gaussian, Likelihood, Poisson
from invdiff.linear_gaussian import LinearGaussian, linear_gaussian
from invdiff.noise import Noise, stream_key
from invdiff.operators.base import Operator
from invdiff.operators.composition import Affine
from invdiff.parallel import ALONE, Shard
from invdiff.potential import LogProbAndGrad, Path
from invdiff.priors.base import Curvature, DiffusionPrior, MaskedPrior, Sigma
from invdiff.priors.given_tokens import condition_tokens
from invdiff.priors.masked import check_tokens
from invdiff.problem import Problem
from invdiff.provenance import prior_key, provenance
from invdiff.solution import Solution

if TYPE_CHECKING:
    from collections.abc import Iterator

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LINEAR_VALUES = 2**24
"""Values of one tensor in a linear solution, where a micro-batch has fewer: 64 MiB in float32."""


@dataclass
class Evaluations:
    """Particles passed through the network and the likelihood, forward and backward.

    This process's in the course of a distributed run, and those of all processes after it.
    """

    denoiser: int = 0
    denoiser_vjp: int = 0
    likelihood: int = 0
    likelihood_grad: int = 0


@dataclass(frozen=True)
class Block:
    """A micro-batch in the middle of a vector-Jacobian product, handed to the caller's cotangent function.

    Parameters
    ----------
    denoised
        D(z, sigma) of these rows, (n, *shape).
    vjp
        v -> (dD/dz)^T v on these rows; may be called many times.
    log_likelihood_and_grad
        Of these rows' measurements, with respect to the latent event.
    deviance
        Of these rows' measurements.
    linear
        The linear-Gaussian problem of these rows, or None.
    """

    denoised: Tensor
    vjp: Callable[[Tensor], Tensor]
    log_likelihood_and_grad: LogProbAndGrad
    deviance: Callable[[Tensor], Tensor]
    linear: LinearGaussian | None


@dataclass(frozen=True)
class TokenBlock:
    """A micro-batch of sequences with masked tokens, handed to the caller's function of their conditionals.

    Parameters
    ----------
    probs
        Conditionals of these rows, (n, length, V), float64; one-hot where a token is known.
    codebook
        Vector of each token, (V, c).
    decode
        Physical units from vectors (n, length, c).
    likelihood
        Of these rows' measurements.
    linear
        The linear-Gaussian problem of these rows in vectors, or None.
    responses
        What each token at each position adds to the noise-free measurement, (length, V, measured), float64, where the
        problem is linear, else None.
    evaluations
        The posterior's counts, to which a function adds the rows that it takes backward through ``decode``.
    """

    probs: Tensor
    codebook: Tensor
    decode: Callable[[Tensor], Tensor]
    likelihood: Likelihood
    linear: LinearGaussian | None
    responses: Tensor | None
    evaluations: Evaluations

    @property
    def gaussian(self) -> Gaussian:
        """The likelihood, of Gaussian noise.

        Raises
        ------
        CapabilityError
            If it is another one.
        """
        if not isinstance(self.likelihood, Gaussian):
            raise CapabilityError(f"The noise of {type(self.likelihood).__name__} is not Gaussian.")
        return self.likelihood


class Posterior:
    """``p(z | y)`` in the prior's latent space; under a masked prior z are tokens, int64.

    Parameters
    ----------
    problem
        One problem, or several that share operator, noise level and event and are solved in one batch.
    prior
        A DiffusionPrior or MaskedPrior.
    device
        Where to run; the prior's own device if None. The prior is moved there; of the likelihood a copy is.
    dtype
        Of the states; float32, or float64 for checks against closed forms.
    micro_batch
        Particles in one pass through the network or the operator; all at once if None.
    precision
        Of the network: "float32", or "bfloat16" or "float16" by autocast.
    compile
        Whether to torch.compile the denoiser.

    Raises
    ------
    ShapeError
        If the problem and the prior speak of different unknowns.
    """

    def __init__(
        self,
        problem: Problem | Sequence[Problem],
        prior: DiffusionPrior | MaskedPrior,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        micro_batch: int | None = None,
        precision: str = "float32",
        compile: bool = False,  # noqa: A002 torch's word
    ) -> None:
        problems = [problem] if isinstance(problem, Problem) else list(problem)
        if not problems:
            raise InputError("There is no problem to solve; pass one or several.")
        if precision not in PRECISIONS:
            raise InputError(f"precision is one of {sorted(PRECISIONS)}, got {precision!r}.")
        if micro_batch is not None and micro_batch < 1:
            raise InputError(f"micro_batch must be at least 1, got {micro_batch}.")
        self._single = isinstance(problem, Problem)
        self.device = torch.device(device) if device is not None else _device_of(prior)
        self.dtype, self.micro_batch, self.precision, self.compiled = dtype, micro_batch, precision, compile
        if any(p.given for p in problems):
            prior = _conditioned(prior, problems)
        self.prior = prior
        if isinstance(prior, nn.Module):
            prior.to(self.device)
            if self.device.type == "cuda" and PRECISIONS[precision] is not None:
                prior.to(memory_format=torch.channels_last)  # what the tensor cores' convolutions take as it is
        self.shape = tuple(prior.shape)
        self._tokens = None if isinstance(prior, DiffusionPrior) or not isinstance(prior, MaskedPrior) else prior
        self._curvature: Curvature | None = getattr(prior, "curvature", None)
        # The way out of a masked prior's vectors, of any other prior's states.
        decoder = getattr(prior, "decoder" if self._tokens is None else "detokeniser", None)
        self._decoder: Operator | None = decoder.to(self.device) if isinstance(decoder, Operator) else None
        self._codebook = None if self._tokens is None else self._tokens.codebook.to(device=self.device, dtype=dtype)
        self._responses: Tensor | None = None
        self.event: Event = getattr(prior, "event", None) or plain_event(self._physical_shape())
        for p in problems:
            check_agreement(p.event, self.event)
        likelihood = problems[0].likelihood if len(problems) == 1 else _stack([p.likelihood for p in problems])
        self._likelihood = _on(likelihood, self.device)
        self._keys = [p.key for p in problems]
        self._about = [(p.name, dict(p.card)) for p in problems]
        self.evaluations = Evaluations()
        self._denoise = prior.denoise if isinstance(prior, DiffusionPrior) else None
        if compile and self._denoise is not None:
            # A graph that serves several vector-Jacobian products must not give its buffers away at the first.
            from torch._functorch import config

            config.donated_buffer = False
            # One shape: code for any number of rows is slower, and it is what a second shape would bring.
            self._denoise = torch.compile(self._denoise, dynamic=False)
        knows = self._tokens is None or self._decoder is not None
        linear = linear_gaussian(self._likelihood, self._decoder) if knows else None
        self._linear: LinearGaussian | None = linear if self._tokens is None else None
        self._vector_linear: LinearGaussian | None = None if self._tokens is None else linear
        self._mean: Tensor | None = None
        self._noise_std: float | None = None  # worked out once: a look at the device waits for it

    # What the problem and the prior can do.

    @property
    def problems(self) -> int:
        """Number of problems solved together."""
        return self._likelihood.problems

    @property
    def sigma_min(self) -> float:
        """Smallest noise level, latent units."""
        return float(self._continuous().sigma_min)

    @property
    def sigma_max(self) -> float:
        """Largest noise level, latent units."""
        return float(self._continuous().sigma_max)

    @property
    def curvature(self) -> Curvature | None:
        """The denoiser's error covariance by sigma, where the prior knows it."""
        return self._curvature

    @property
    def linear(self) -> LinearGaussian | None:
        """The linear-Gaussian problem in latent units, or None; tokens have none."""
        return self._linear

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens of a masked prior, the mask not among them."""
        return self._masked().vocabulary_size

    @property
    def mask_token(self) -> int:
        """Index of a masked prior's mask."""
        return self._masked().mask_token

    @property
    def codebook(self) -> Tensor:
        """Vector of each token of a masked prior, (V, c)."""
        self._masked()
        assert self._codebook is not None
        return self._codebook

    @property
    def measurements(self) -> int:
        """Number of real values in one measurement."""
        return self._likelihood.measurements

    @property
    def noise_std(self) -> float | None:
        """Root-mean-square noise in units of the operator's output, of Gaussian noise or counts; else None."""
        if self._noise_std is None:
            if isinstance(self._likelihood, Gaussian):
                self._noise_std = float((self._likelihood.noise_std**2).mean().sqrt())
            elif isinstance(self._likelihood, Poisson):
                self._noise_std = self._likelihood.noise_level
        return self._noise_std

    @property
    def capabilities(self) -> frozenset[str]:
        """What samplers may rely on.

        Of likelihood_gradient, denoiser, denoiser_vjp, curvature, gaussian, linear, svd, masked, embedding_gradient,
        embedding_linear.
        """
        found = set()
        # A likelihood's operators, and those that they are made of, are its modules.
        if all(getattr(module, "differentiable", True) for module in self._likelihood.modules()):
            # Tokens have no gradient; the vectors that stand for them do.
            found.add("likelihood_gradient" if self._tokens is None else "embedding_gradient")
        if isinstance(self._likelihood, Gaussian):
            found.add("gaussian")
        if isinstance(self.prior, DiffusionPrior):
            found |= {"denoiser"} | ({"denoiser_vjp"} if getattr(self.prior, "differentiable", True) else set())
        if self._tokens is not None:
            found.add("masked")
            if self._vector_linear is not None:
                found.add("embedding_linear")
        if self.curvature is not None:
            found.add("curvature")
        if self._linear is not None:
            found |= {"linear"} | ({"svd"} if self._linear.has_svd else set())
        return frozenset(found)

    def require(self, sampler: Sampler) -> None:
        """Raise CapabilityError, naming what is missing, unless the sampler can run here."""
        missing = sampler.requires() - self.capabilities
        if missing:
            raise CapabilityError(
                f"{type(sampler).__name__} needs {', '.join(sorted(missing))}, which this problem and prior "
                f"do not have (they have: {', '.join(sorted(self.capabilities))})."
            )

    # The prior.

    def denoise(self, z: Tensor, sigma: Sigma) -> Tensor:
        """E[z_0 | z_sigma = z], for z of any leading axes; sigma a float or a tensor of the leading axes."""
        flat, levels = self._flat(z), self._levels(z, sigma)
        out = [self._network(flat[s], _at(levels, s)) for s in self._chunks(len(flat))]
        return torch.cat(out).reshape(z.shape)

    def denoise_vjp(self, z: Tensor, sigma: Sigma, cotangent: Callable[[Block], Tensor]) -> tuple[Tensor, Tensor]:
        """D(z, sigma), and ``(dD/dz)^T v`` for the v that ``cotangent`` makes of each micro-batch.

        The graph of one micro-batch is alive at a time, so memory does not grow with the number of particles.
        """
        flat, levels, rows = self._flat(z), self._levels(z, sigma), self.rows(z)
        denoised, products = [], []
        for s in self._chunks(len(flat)):
            with torch.enable_grad():
                leaf = flat[s].detach().requires_grad_()
                d = self._network(leaf, _at(levels, s))

            def vjp(v: Tensor, d: Tensor = d, leaf: Tensor = leaf) -> Tensor:
                self.evaluations.denoiser_vjp += len(v)
                return torch.autograd.grad(d, leaf, v.to(d.dtype), retain_graph=True)[0]

            likelihood = self._likelihood.rows(rows[s])
            block = Block(
                denoised=d.detach(),
                vjp=vjp,
                log_likelihood_and_grad=self._latent(likelihood),
                deviance=lambda x, likelihood=likelihood: likelihood.deviance(self._decoded(x)),  # type: ignore[misc]
                linear=None if self._linear is None else self._linear.rows(rows[s]),
            )
            products.append(vjp(cotangent(block)))
            denoised.append(block.denoised)
        return torch.cat(denoised).reshape(z.shape), torch.cat(products).reshape(z.shape)

    def log_probs(self, tokens: Tensor) -> Tensor:
        """Log-probabilities (..., length, vocabulary) of a masked prior at tokens (..., length), float64.

        Raises
        ------
        CapabilityError
            If the prior is not a masked one.
        ShapeError, InputError
            If the sequences have another length, or a token is out of the vocabulary.
        SamplingError
            If the prior gives NaN.
        """
        prior, flat = self._masked(), self._flat(tokens)
        check_tokens(flat, self.shape[-1], prior.mask_token, type(prior).__name__)
        self.evaluations.denoiser += len(flat)
        level, found = PRECISIONS[self.precision], []
        for s in self._chunks(len(flat)):
            with torch.autocast(self.device.type, dtype=level) if level is not None else nullcontext():
                found.append(prior.log_probs(flat[s]))
        # Low precision would draw as from a lower temperature.
        out = torch.cat([t.double() for t in found])
        if bool(torch.isnan(out).any()):
            raise SamplingError(f"{type(prior).__name__} gave log-probabilities that are NaN; check its network.")
        return out.reshape(*tokens.shape, prior.vocabulary_size)

    def token_rows(self, log_probs: Tensor, function: Callable[[TokenBlock], Tensor]) -> Tensor:
        """Apply a function to the conditionals (..., length, vocabulary) of sequences; as the leading axes in shape."""
        assert self._codebook is not None
        lead = log_probs.shape[:-2]
        flat, rows = log_probs.flatten(0, -3), self.rows(log_probs[..., 0])
        self.evaluations.likelihood += len(flat)
        parts = [
            function(
                TokenBlock(
                    probs=flat[s].exp(),
                    codebook=self._codebook,
                    decode=self._from_vectors,
                    likelihood=self._likelihood.rows(rows[s]),
                    linear=None if self._vector_linear is None else self._vector_linear.rows(rows[s]),
                    responses=self._token_responses(),
                    evaluations=self.evaluations,
                )
            )
            for s in self._chunks(len(flat))
        ]
        return torch.cat(parts).reshape(lead)

    def noised_mean(self) -> Tensor:
        """Mean of the prior as its denoiser sees it at sigma_max, (*shape): the centre of the first noisy state."""
        if self._mean is None:
            zero = torch.zeros(1, *self.shape, dtype=self.dtype, device=self.device)
            with torch.no_grad():
                # Not through `_network`: it would compile for one row, and is no particle's evaluation.
                self._mean = self._continuous().denoise(zero, self.sigma_max)[0]
        return self._mean

    def start(self, ensembles: int, n: int, noise: Noise, sigma: float | None = None) -> Tensor:
        """First noisy state, N(mean, sigma^2), of shape (ensembles, n, *shape); sigma_max if sigma is None."""
        shape = (ensembles, n, *self.shape)
        return self.noised_mean() + (self.sigma_max if sigma is None else sigma) * noise.like(
            torch.empty(shape, dtype=self.dtype, device=self.device)
        )

    def decode(self, z: Tensor) -> Tensor:
        """Physical units, as one tensor (..., *physical shape)."""
        lead = z.shape[: z.ndim - len(self.shape)]
        x = self._decoded(self._flat(z))
        return x.reshape(*lead, *x.shape[1:])

    # The likelihood.

    def log_likelihood(self, z: Tensor) -> Tensor:
        """Log p(y | z), of the leading axes' shape."""
        return self._over_rows(z, lambda likelihood, x: (likelihood.log_prob(self._decoded(x)),))[0]

    def log_likelihood_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log p(y | z) and its gradient with respect to z, which tokens have not."""
        if self._tokens is not None:
            raise CapabilityError("Tokens have no gradient; `token_rows` gives the way to that of their vectors.")
        self.evaluations.likelihood_grad += self._count(z)
        value, grad = self._over_rows(z, lambda likelihood, x: self._latent(likelihood)(x))
        return value, grad.reshape(z.shape)

    def embedding_log_likelihood_and_grad(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Log p(y | decode_embedding(e)) of vectors e (..., length, c), and its gradient with respect to e.

        Raises
        ------
        CapabilityError
            If the prior is not a masked one.
        ShapeError
            If the vectors have another shape.
        """
        ends = (*self.shape, self.codebook.shape[1])
        lead = embedding.shape[: embedding.ndim - 2]
        if tuple(embedding.shape[-2:]) != ends or not lead:
            raise ShapeError(f"Vectors here have shape (..., {ends[0]}, {ends[1]}), got {tuple(embedding.shape)}.")
        flat, rows = embedding.reshape(-1, *ends), self.rows(embedding[..., 0])
        self.evaluations.likelihood += len(flat)
        self.evaluations.likelihood_grad += len(flat)
        values, grads = [], []
        for s in self._chunks(len(flat)):
            with torch.enable_grad():
                leaf = flat[s].detach().requires_grad_()
                x = self._from_vectors(leaf)
            value, grad = self._likelihood.rows(rows[s]).log_prob_and_grad(x.detach())
            values.append(value)
            grads.append(torch.autograd.grad(x, leaf, grad)[0])
        return torch.cat(values).reshape(lead), torch.cat(grads).reshape(embedding.shape)

    def deviance(self, z: Tensor) -> Tensor:
        """Twice the log-likelihood lost against a perfect fit; a chi-square for Gaussian noise."""
        return self._over_rows(z, lambda likelihood, x: (likelihood.deviance(self._decoded(x)),))[0]

    def misfit(self, z: Tensor) -> float:
        """Reduced chi-square: mean deviance a measured value; 1 where the fit is as good as the noise."""
        return float(self.deviance(z).mean()) / self.measurements

    def rows(self, z: Tensor) -> Tensor:
        """Index of the problem that each particle of z belongs to, flat."""
        m, p = self._count(z), self.problems
        if m % p:
            raise ShapeError(f"{m} particles cannot be shared by {p} problems.")
        return torch.arange(p, device=z.device).repeat_interleave(m // p)

    def linear_rows(self, z: Tensor, function: Callable[..., Tensor], *more: Tensor) -> Tensor:
        """Apply ``function(linear problem of the rows, rows, rows of more ...)``, many rows at once; as z in shape."""
        if self._linear is None:
            raise CapabilityError("This problem is not linear with Gaussian noise.")
        flats, rows = [self._flat(t) for t in (z, *more)], self.rows(z)
        self.evaluations.likelihood_grad += len(rows)
        # A micro-batch bounds the memory of the network, which is far more than what is needed here.
        together = max(self.micro_batch or len(rows), _LINEAR_VALUES // prod(self.shape))
        chunks = self._chunks(len(rows), together)
        parts = [function(self._linear.rows(rows[s]), *(t[s] for t in flats)) for s in chunks]
        return torch.cat(parts).reshape(z.shape)

    def potential(self, sigma: float, path: Path) -> LogProbAndGrad:
        """Temper the likelihood along a path: z -> (f_sigma of the leading axes' shape, gradient of z's shape)."""

        def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
            flat, rows = self._flat(z), self.rows(z)
            values, grads = [], []
            for s in self._chunks(len(flat)):
                linear = None if self._linear is None else self._linear.rows(rows[s])
                f = path.potential(sigma, linear, self._latent(self._likelihood.rows(rows[s])))
                value, grad = f(flat[s])
                self.evaluations.likelihood += len(value)
                self.evaluations.likelihood_grad += len(value)
                values.append(value)
                grads.append(grad)
            return torch.cat(values).reshape(z.shape[: z.ndim - len(self.shape)]), torch.cat(grads).reshape(z.shape)

        return value_and_grad

    # Sampling.

    def sample(
        self,
        sampler: Sampler,
        draws: int = 16,
        *,
        seed: int = 0,
        chains: int = 1,
        budget: Budget | None = None,
        progress: bool | str = False,
        callback: Callback | None = None,
        checkpoint: str | FilePath | None = None,
        checkpoint_every: float = 30.0,
        distributed: bool = False,
    ) -> "Solution | list[Solution]":
        """Draw from the posterior.

        With ``distributed`` each ensemble is shared by the processes of torch.distributed: every process makes this
        call on a posterior of the same problems and prior, on a device of its own, runs its share of the draws, and
        returns the solution of all draws. The draws are those of a single process, but for rounding. An error in one
        process is raised in all.

        Parameters
        ----------
        sampler
            A sampler's settings.
        draws
            Draws (particles) in a chain.
        seed
            Seed; the same seed gives the same draws for any micro-batch and whatever other problems are solved beside
            this one.
        chains
            Independent ensembles a problem.
        budget, progress, callback, checkpoint, checkpoint_every
            As in `invdiff.driver.run`.
        distributed
            Whether to share the draws of each chain among the processes of torch.distributed's default group, which the
            caller has initialised. Not taken for granted where there is one: its processes may well work on problems of
            their own.

        Returns
        -------
            A solution, or a list of them if the posterior was made from a list of problems.

        Raises
        ------
        CapabilityError
            If the sampler cannot do the problem.
        InputError
            If draws or chains are not positive; in a distributed run, if there are no processes, if the draws of a
            chain are not a multiple of their number, or if they were asked for different things.
        SamplingError
            If the run fails or is stopped before it has draws; a PeerError if it was another process that failed.
        """
        if draws < 1 or chains < 1:
            raise InputError(f"A solution needs at least one draw and one chain, got draws={draws}, chains={chains}.")
        self.require(sampler)
        shard = Shard.current() if distributed else ALONE
        self.evaluations, began = Evaluations(), time.perf_counter()
        keys = [stream_key(seed, key, chain) for key in self._keys for chain in range(chains)]
        noise = Noise(keys, draws, device=self.device, dtype=self.dtype, shard=shard)
        total = len(keys) * shard.share(draws)
        identity = (
            f"{sampler!r} {self._keys} {prior_key(self.prior)} draws={draws} chains={chains} seed={seed} {self.dtype}"
        )
        with shard.together():
            outcome = driver.run(
                sampler,
                self,
                ensembles=len(keys),
                n=draws,
                noise=noise,
                evaluations=lambda: self.evaluations.denoiser / total,
                budget=budget,
                callback=callback,
                progress=progress,
                checkpoint=None if checkpoint is None else FilePath(checkpoint),
                checkpoint_every=checkpoint_every,
                identity=identity,
            )
            counts = shard.agree(*astuple(self.evaluations))
            self.evaluations = Evaluations(*(int(sum(column)) for column in zip(*counts, strict=True)))
            seconds = shard.agree(time.perf_counter() - began)[0][0]
            about = provenance(self, sampler, outcome, draws=draws, chains=chains, seed=seed, seconds=seconds)
            about["processes"] = shard.world
            solutions = self._solutions(outcome, about, chains, seed)
        return solutions[0] if self._single else solutions

    # Within.

    def _solutions(self, outcome: driver.Outcome, about: dict[str, Any], chains: int, seed: int) -> list[Solution]:
        """One solution a problem."""
        solutions, found = [], outcome.draws
        if hasattr(self.prior, "fill"):  # what a sampler wrote where a token is given stands for that token
            found = replace(found, z=self.prior.fill(found.z))
        with torch.no_grad():
            for i in range(self.problems):
                part = slice(i * chains, (i + 1) * chains)
                likelihood = self._likelihood.rows(torch.tensor([i], device=self.device))
                own = about | {
                    "problem": self._about[i][0],
                    "problem_card": self._about[i][1],
                    "problem_key": self._keys[i],
                }
                solutions.append(
                    Solution.from_draws(
                        found,
                        part,
                        decode=self.decode,
                        split=self._split,
                        event=self.event,
                        likelihood=likelihood,
                        trace=outcome.trace,
                        about=own,
                        seed=stream_key(seed, self._keys[i], "resample"),
                        micro_batch=self.micro_batch,
                    )
                )
        return solutions

    def _masked(self) -> MaskedPrior:
        if self._tokens is None:
            raise CapabilityError(f"{type(self.prior).__name__} is not a masked prior; it has no tokens.")
        return self._tokens

    def _physical_shape(self) -> tuple[int, ...]:
        """Shape of the unknown where the prior does not say."""
        if self._decoder is not None:
            return self._decoder.out_shape
        if self._codebook is None:
            return self.shape
        with torch.no_grad():
            return tuple(self._from_vectors(self._codebook[:1].expand(1, *self.shape, -1)).shape[1:])

    def _from_vectors(self, embedding: Tensor) -> Tensor:
        """Physical units from a masked prior's vectors (n, length, c)."""
        return self._masked().decode_embedding(embedding)

    def _token_responses(self) -> Tensor | None:
        """Return what A makes of each token at each position, all other vectors zero; worked out once."""
        if self._vector_linear is None or self._codebook is None:
            return None
        if self._responses is None:
            A, (length,), c = self._vector_linear.operator, self.shape, self._codebook.shape[1]
            basis = torch.eye(length * c, dtype=self.dtype, device=self.device).reshape(-1, length, c)
            columns = torch.cat([A(basis[s]) for s in self._chunks(len(basis))]).reshape(length, c, -1).double()
            self._responses = torch.einsum("vc,lcm->lvm", self._codebook.double(), columns)
        return self._responses

    def _continuous(self) -> DiffusionPrior:
        if not isinstance(self.prior, DiffusionPrior):
            raise CapabilityError(f"{type(self.prior).__name__} has no noise levels; it is not a diffusion prior.")
        return self.prior

    def _network(self, z: Tensor, sigma: Sigma) -> Tensor:
        if self._denoise is None:
            raise CapabilityError(f"{type(self.prior).__name__} has no denoiser.")
        self.evaluations.denoiser += len(z)
        level, n = PRECISIONS[self.precision], len(z)
        if self.compiled:
            if not isinstance(sigma, Tensor):
                sigma = torch.full((n,), sigma, dtype=z.dtype, device=z.device)  # a float would be compiled in
            missing = (self.micro_batch or n) - n
            if missing > 0:  # rows that nobody reads, in place of a compilation for every number of rows
                z = torch.cat((z, z[-1:].expand(missing, *self.shape)))
                sigma = torch.cat((sigma, sigma[-1:].expand(missing)))
        with torch.autocast(self.device.type, dtype=level) if level is not None else nullcontext():
            return self._denoise(z, sigma)[:n].to(z.dtype)

    def _decoded(self, z: Tensor) -> Tensor:
        if self._tokens is not None:
            assert self._codebook is not None
            check_tokens(z, self.shape[-1], self._tokens.vocabulary_size - 1, type(self._tokens).__name__)
            return self._from_vectors(self._codebook[z])
        if self._decoder is not None:
            return self._decoder(z)
        decode = getattr(self.prior, "decode", None)
        return z if decode is None else cast(Tensor, decode(z))

    def _latent(self, likelihood: Likelihood) -> LogProbAndGrad:
        """Log-likelihood and gradient in the latent event; the decoder's adjoint pulls the gradient back."""
        decoder = self._decoder

        def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
            if decoder is None and not hasattr(self.prior, "decode"):
                return likelihood.log_prob_and_grad(z)
            if isinstance(decoder, Affine):
                value, grad = likelihood.log_prob_and_grad(decoder(z))
                return value, decoder.scale * grad
            with torch.enable_grad():
                leaf = z.detach().requires_grad_()
                x = self._decoded(leaf)
            value, grad = likelihood.log_prob_and_grad(x.detach())
            return value, torch.autograd.grad(x, leaf, grad)[0]

        return value_and_grad

    def _over_rows(self, z: Tensor, function: Callable[[Likelihood, Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        flat, rows = self._flat(z), self.rows(z)
        self.evaluations.likelihood += len(flat)
        parts = [function(self._likelihood.rows(rows[s]), flat[s]) for s in self._chunks(len(flat))]
        lead = z.shape[: z.ndim - len(self.shape)]
        return tuple(t.reshape(*lead, *t.shape[1:]) for t in (torch.cat(p) for p in zip(*parts, strict=True)))

    def _flat(self, z: Tensor) -> Tensor:
        if tuple(z.shape[z.ndim - len(self.shape) :]) != self.shape or z.ndim == len(self.shape):
            raise ShapeError(f"States here have shape (..., {', '.join(map(str, self.shape))}), got {tuple(z.shape)}.")
        return z.reshape(-1, *self.shape)

    def _count(self, z: Tensor) -> int:
        return prod(z.shape[: z.ndim - len(self.shape)])

    def _levels(self, z: Tensor, sigma: Sigma) -> Sigma:
        if not isinstance(sigma, Tensor) or sigma.ndim == 0:
            return float(sigma)
        return sigma.expand(z.shape[: z.ndim - len(self.shape)]).reshape(-1)

    def _chunks(self, m: int, size: int | None = None) -> "Iterator[slice]":
        size = size or self.micro_batch or m
        return (slice(i, min(i + size, m)) for i in range(0, m, size))

    def _split(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """Physical draws by variable where the event has several."""
        if len(self.event) == 1:
            return x
        lead = x.shape[: x.ndim - 1]
        parts = torch.split_with_sizes(x, [v.size for v in self.event], dim=-1)
        return {v.name: part.reshape(*lead, *v.shape) for v, part in zip(self.event, parts, strict=True)}


def _at(levels: Sigma, rows: slice) -> Sigma:
    return levels[rows] if isinstance(levels, Tensor) else levels


def _device_of(prior: object) -> torch.device:
    if isinstance(prior, nn.Module):
        for tensor in (*prior.parameters(), *prior.buffers()):
            return tensor.device
    return torch.device("cpu")


def _on(likelihood: Likelihood, device: torch.device) -> Likelihood:
    """Give the likelihood on a device: a copy if it is on another, so that the problem's operator stays where it is."""
    there = torch.empty(0, device=device).device  # "cuda" with its index
    tensors = [*likelihood.parameters(), *likelihood.buffers()]
    return likelihood if all(t.device == there for t in tensors) else copy.deepcopy(likelihood).to(there)


def _stack(parts: Sequence[Likelihood]) -> Likelihood:
    if len({type(p) for p in parts}) != 1:
        raise InputError(
            f"Problems that run together have one kind of likelihood, got {sorted({type(p).__name__ for p in parts})}."
        )
    return type(parts[0]).stack(parts)


def _conditioned(prior: Any, problems: Sequence[Problem]) -> Any:
    condition = getattr(prior, "condition", None)
    if condition is None and isinstance(prior, MaskedPrior) and not isinstance(prior, DiffusionPrior):
        condition = partial(condition_tokens, prior)  # never to mask what is given is all there is to it
    if condition is None:
        raise CapabilityError(
            f"The problem gives {sorted(problems[0].given)} as known, "
            f"but {type(prior).__name__} has no condition(given)."
        )
    if len(problems) > 1:
        raise InputError("Problems with given variables are solved one by one; pass them to solve singly.")
    return condition(problems[0].given)
