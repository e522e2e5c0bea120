r"""Simulation-based calibration: whether a sampler's uncertainty is right where no exact posterior is known.

Truths are drawn from the prior itself, measured, and solved. Truth and exact posterior draws then have one law given
the measurement, so that the truth's rank among L draws, by any function of the event, is uniform on 0 to L (Cook et al.
2006; Talts et al. 2018, arXiv 1804.06788). Histograms that are high at both ends show draws that are too narrow, high
in the middle too wide, sloping ones a bias. The log-likelihood of the truth's measurement is always ranked: without it
a sampler that ignores the measurement and draws from the prior would pass (Modrák et al. 2023, arXiv 2211.02383).

What is tested is the sampler together with how the truths were drawn. Truths of a network prior come from its ODE at a
finite number of steps and are not exactly of the law that the denoiser stands for at every noise level, which no
network's denoiser is the exact mean of anyway; raise ``truth_steps`` until the result no longer changes.

Departures from the papers: p-values are exact for few truths and allow for the dependence of quantities by relabelling
(see `invdiff.diagnostics.calibration_ranks`), and a rank that an interval's edge cuts counts by its share, so that
coverage has no bias for any number of draws.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from invdiff.diagnostics import calibration_ranks as statistics
from invdiff.diagnostics.calibration_quantities import Quantity, default_quantities
from invdiff.diagnostics.calibration_result import Calibration, Coverage, Histogram
from invdiff.driver import Sampler
from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.noise import stream_key
from invdiff.operators.base import Operator
from invdiff.priors.base import DiffusionPrior, MaskedPrior
from invdiff.priors.loading import load_prior
from invdiff.problem import Problem
from invdiff.solution import Solution
from invdiff.solve import as_device, solve

__all__ = ["Calibration", "Coverage", "Histogram", "calibrate", "default_quantities"]

FEWEST_DRAWS = 19
"""Draws that an interval of 90 % needs."""
LIKELIHOOD = "log-likelihood"


def calibrate(
    operator: Operator | Callable[[Tensor, int], Problem],
    prior: DiffusionPrior | MaskedPrior | str,
    sampler: Sampler | str | None = None,
    *,
    noise_std: float | None = None,
    truths: int = 64,
    draws: int = 31,
    particles: int | None = None,
    seed: int = 0,
    quantities: Mapping[str, Quantity] | None = None,
    truth_sampler: Callable[[int, int], Tensor] | None = None,
    truth_steps: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    micro_batch: int | None = None,
    precision: str = "float32",
    compile: bool = False,  # noqa: A002 torch's word
    together: int | None = None,
    max_evaluations: float | None = None,
    max_seconds: float | None = None,
    progress: bool | str = False,
) -> Calibration:
    """Rank truths of the prior among a sampler's draws from their posteriors.

    Parameters
    ----------
    operator
        Measurement operator; or (truth (*event), physical units, seed) -> problem, for other likelihoods than Gaussian
        noise. The problems must share operator and noise level, as for `solve`.
    prior
        A prior, or the name of a shipped one.
    sampler
        As for `solve`.
    noise_std
        Noise in the measurement's units, positive; with an operator only.
    truths, draws
        How many truths, at least 2, and draws of each, at least 19; draws + 1 with many divisors makes good histograms.
    particles
        Particles of the sampler, of whose equal-weight draws ``draws`` are taken at random; as many as draws if None.
        More thin a Markov chain, whose draws are not independent and so not uniform in rank, and make an importance
        sampler's resampled draws distinct.
    seed
        Truths, measurements, draws and ties follow from it.
    quantities
        Functions of events by name; `default_quantities` if None. The log-likelihood is added to them.
    truth_sampler
        (n, seed) -> latent events (n, *shape), for priors without ``sample``, or with another law.
    truth_steps
        Passed to ``prior.sample`` as ``steps``, for priors whose draws are an integrator's; their own default if None.
    device, dtype, micro_batch, precision, compile, together, max_evaluations, max_seconds, progress
        As in `solve`.

    Returns
    -------
        Ranks, coverage, p-values and figures.

    Raises
    ------
    InputError
        If there are too few truths or draws, or a quantity is not finite.
    ShapeError
        If the truths or a quantity have the wrong shape.
    CapabilityError
        If the prior cannot draw truths, or the sampler cannot do the problem.
    """
    if truths < 2 or draws < FEWEST_DRAWS:
        raise InputError(
            f"Calibration needs at least 2 truths and {FEWEST_DRAWS} draws of each, got {truths} and {draws}."
        )
    if particles is not None and particles < draws:
        raise InputError(f"{draws} draws cannot be taken of {particles} particles; leave particles out or raise it.")
    if isinstance(operator, Operator) and noise_std is None:
        raise InputError("Give noise_std, the noise in the measurement's units, with an operator.")
    place = as_device(device)
    known: DiffusionPrior | MaskedPrior = load_prior(prior) if isinstance(prior, str) else prior
    if place is not None and isinstance(known, nn.Module):
        known.to(place)
    latents = _draw_truths(known, truths, stream_key(seed, "truths"), truth_sampler, truth_steps)
    problems = []
    for i, x in enumerate(_decode(known, latents.to(dtype) if latents.is_floating_point() else latents)):
        noise_seed = stream_key(seed, "noise", i)
        if isinstance(operator, Operator):
            assert noise_std is not None
            problem = Problem.simulate(operator.to(x.device), x, noise_std=noise_std, seed=noise_seed)
        else:
            problem = operator(x, noise_seed)
        problems.append((problem, x.cpu()))
    solutions: list[Solution] = solve(
        [p for p, _ in problems],
        known,
        sampler,
        draws=particles or draws,
        seed=seed,
        device=place,
        dtype=dtype,
        micro_batch=micro_batch,
        precision=precision,
        compile=compile,
        together=together,
        max_evaluations=max_evaluations,
        max_seconds=max_seconds,
        progress=progress,
    )
    generator = torch.Generator().manual_seed(stream_key(seed, "ranks") >> 1)
    functions = default_quantities(tuple(problems[0][1].shape), seed) if quantities is None else dict(quantities)
    found: dict[str, list[Tensor]] = {}
    for (_, x), solution in zip(problems, solutions, strict=True):
        chosen = torch.randperm(particles or draws, generator=generator)[:draws]
        members = torch.cat([x[None], _joined(solution)[chosen].to(x)])
        for name, values in _evaluate(functions, solution, members, micro_batch):
            found.setdefault(name, []).append(statistics.ranks_of_all(values, generator))
    about = solutions[0].about
    return Calibration(
        members={name: torch.stack(parts) for name, parts in found.items()},
        draws=draws,
        evaluations=float(about["evaluations_per_draw"]),
        sampler=str(about["sampler_settings"]),
        seed=seed,
        about=about,
    )


def _draw_truths(
    prior: DiffusionPrior | MaskedPrior,
    n: int,
    seed: int,
    sampler: Callable[[int, int], Tensor] | None,
    steps: int | None,
) -> Tensor:
    sample = getattr(prior, "sample", None)
    if sampler is not None:
        z = sampler(n, seed)
    elif sample is None:
        raise CapabilityError(
            f"{type(prior).__name__} has no sample(n, seed=...) to draw truths with; give truth_sampler=(n, seed) -> z."
        )
    else:
        z = sample(n, seed=seed, **({} if steps is None else {"steps": steps}))
    if tuple(z.shape) != (n, *prior.shape):
        raise ShapeError(f"The truths must be latent events of shape {(n, *prior.shape)}, got {tuple(z.shape)}.")
    return z


def _decode(prior: DiffusionPrior | MaskedPrior, z: Tensor) -> Tensor:
    """Physical units, as a posterior has them."""
    decoder = getattr(prior, "decoder", None)
    decode = decoder.to(z.device) if isinstance(decoder, Operator) else getattr(prior, "decode", None)
    with torch.no_grad():
        return z if decode is None else torch.as_tensor(decode(z))


def _joined(solution: Solution) -> Tensor:
    """Draws as the likelihood takes them: several variables share one flat tensor."""
    draws = solution.draws
    if isinstance(draws, Tensor):
        return draws
    return torch.cat([draws[v.name].flatten(1) for v in solution.event], dim=1)


def _evaluate(
    functions: Mapping[str, Quantity], solution: Solution, members: Tensor, micro_batch: int | None
) -> Iterator[tuple[str, Tensor]]:
    """Values (members, components) of each quantity and of the log-likelihood, up to a constant."""
    likelihood = solution.likelihood
    assert likelihood is not None
    device = next((b.device for b in likelihood.buffers()), members.device)

    def log_likelihood(x: Tensor) -> Tensor:
        parts = torch.split(x.to(device), micro_batch or len(x))
        return -0.5 * torch.cat([likelihood.deviance(part) for part in parts]).cpu()

    with torch.no_grad():
        for name, function in {**functions, LIKELIHOOD: log_likelihood}.items():
            values = function(members)
            if values.shape[0] != len(members) or values.ndim not in {1, 2}:
                raise ShapeError(
                    f"The quantity {name!r} must map events (n, *event) to (n,) or (n, components), "
                    f"got {tuple(values.shape)} for n = {len(members)}."
                )
            if not bool(torch.isfinite(values).all()):
                raise InputError(f"The quantity {name!r} is not finite for every truth and draw.")
            yield name, values.reshape(len(members), -1)
