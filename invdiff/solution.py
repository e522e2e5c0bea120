"""A solution: posterior draws with names, units, coordinates, weights and provenance."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from invdiff import metrics
from invdiff.draws import Draws, systematic_resample
from invdiff.driver import Info
from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.event import Event, Variable
from invdiff.files import atomic_path, reserve
from invdiff.likelihoods import Likelihood
from invdiff.noise import Noise

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

Values = Tensor | dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """Equal-weight draws from a posterior, in physical units.

    Parameters
    ----------
    event
        The unknown.
    by_chain
        Draws by variable, each (chain, draw, *shape).
    particles, log_weights, ancestors
        The weighted draws that the equal-weight ones were resampled from, by variable, (chain, particle, *shape); their
        log-weights, and for each draw the particle it copies; None where the sampler's draws have equal weight.
    tokens, particle_tokens
        Under a masked prior, the tokens of ``by_chain`` and of ``particles``, (chain, draw, length), int64; else None.
    chain_log_evidence
        Log p(y) from each ensemble, or None.
    is_chain
        Whether the draws of a chain are states of one Markov chain, so that R-hat has a meaning.
    deviance
        Deviance of each draw, (chain, draw).
    trace
        One entry a step.
    measurement
        What was measured.
    reference
        The truth by variable, where there is one.
    likelihood
        What was solved; None after `load`, where only the file is left.
    about
        Provenance.
    """

    event: Event
    by_chain: Mapping[str, Tensor]
    particles: Mapping[str, Tensor] | None = None
    log_weights: Tensor | None = None
    ancestors: Tensor | None = None
    tokens: Tensor | None = None
    particle_tokens: Tensor | None = None
    chain_log_evidence: Tensor | None = None
    is_chain: bool = False
    deviance: Tensor
    trace: Sequence[Info] = ()
    measurement: Tensor | None = None
    reference: Mapping[str, Tensor] | None = None
    likelihood: Likelihood | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_draws(
        cls,
        draws: Draws,
        part: slice,
        *,
        decode: Callable[[Tensor], Tensor],
        split: Callable[[Tensor], Values],
        event: Event,
        likelihood: Likelihood,
        trace: Sequence[Info],
        about: Mapping[str, Any],
        seed: int,
        micro_batch: int | None = None,
    ) -> Self:
        """Build the solution of one problem from the ensembles ``part`` of a run's draws."""
        x = decode(draws.z[part])
        weights, particles, ancestors, particle_tokens = None, None, None, None
        tokens = None if draws.z.is_floating_point() else draws.z[part]
        if draws.log_weights is not None:
            # On the CPU, where sums round in one way: every process of a run takes the same draws.
            weights, particles = draws.log_weights[part].cpu(), _by_name(split(x), event)
            noise = Noise([seed + i for i in range(len(x))], 1)
            ancestors = systematic_resample(weights, noise.shared())

            def chosen(rows: Tensor, index: Tensor = ancestors) -> Tensor:
                return torch.stack([row[i.to(row.device)] for row, i in zip(rows, index, strict=True)])

            x = chosen(x)
            if tokens is not None:
                tokens, particle_tokens = chosen(tokens), tokens
        flat = x.reshape(-1, *x.shape[2:])
        deviance = torch.cat([likelihood.deviance(rows) for rows in torch.split(flat, micro_batch or len(flat))])
        measured = getattr(likelihood, "measurement", None)
        return cls(
            event=event,
            by_chain=_cpu(_by_name(split(x), event)),
            particles=None if particles is None else _cpu(particles),
            log_weights=weights,
            ancestors=ancestors,
            tokens=None if tokens is None else tokens.cpu(),
            particle_tokens=None if particle_tokens is None else particle_tokens.cpu(),
            chain_log_evidence=None if draws.log_evidence is None else draws.log_evidence[part].cpu(),
            is_chain=draws.is_chain,
            deviance=deviance.reshape(x.shape[:2]).cpu(),
            trace=tuple(trace),
            measurement=None if measured is None else measured[0].cpu(),
            likelihood=likelihood,
            about=dict(about),
        )

    def with_reference(self, reference: Values | None) -> Self:
        """Return the same solution with a truth to score against."""
        return self if reference is None else replace(self, reference=_cpu(_by_name(reference, self.event)))

    def because(self, reason: str) -> Self:
        """Return the same solution with the reason for its sampler in the provenance."""
        return replace(self, about={**self.about, "sampler_reason": reason})

    # The draws and their summaries.

    @property
    def draws(self) -> Values:
        """Equal-weight draws, (draws, *event), all chains together, physical units; a dict for several variables."""
        return self._each(lambda name: self.by_chain[name].flatten(0, 1))

    def mean(self) -> Values:
        """Posterior mean, physical units: of all known summaries the one with the least squared error."""
        return self._each(lambda name: self.by_chain[name].flatten(0, 1).mean(0))

    def std(self) -> Values:
        """Posterior standard deviation of each value (divisor draws - 1); NaN for a single draw."""
        return self._each(lambda name: _std(self.by_chain[name].flatten(0, 1)))

    def quantile(self, q: float) -> Values:
        """Quantile of each value by Weibull plotting positions, q in [1 / (draws + 1), draws / (draws + 1)]."""
        return self._each(lambda name: metrics.quantile(self.by_chain[name].flatten(0, 1), q))

    def interval(self, level: float = 0.9) -> tuple[Values, Values]:
        """Central interval of each value by Weibull plotting positions; 90 % needs at least 19 draws.

        Raises
        ------
        InputError
            If there are too few draws for the level.
        """
        tail = 0.5 * (1.0 - level)
        return self.quantile(tail), self.quantile(1.0 - tail)

    @property
    def log_evidence(self) -> float | None:
        """Log p(y): log of the mean of the ensembles' evidences; None where the sampler does not estimate it."""
        z = self.chain_log_evidence
        return None if z is None else float(torch.logsumexp(z.double(), 0)) - log(len(z))

    @property
    def log_evidence_se(self) -> float | None:
        """Standard error of `log_evidence` from independent ensembles (delta method); None with fewer than two."""
        z = self.chain_log_evidence
        if z is None or len(z) < 2 or self.log_evidence is None:
            return None
        ratios = torch.exp(z.double() - self.log_evidence)
        return float(ratios.std() / len(z) ** 0.5)

    # Against the measurement and the truth.

    def predict(self) -> Tensor:
        """Noise-free measurements of the draws, (draws, *out_shape): what the operator makes of them."""
        operator = getattr(self.likelihood, "operator", None)
        if operator is None:
            raise CapabilityError(
                "A solution read from a file, or of a likelihood without an operator, cannot predict."
            )
        device = next((b.device for b in self.likelihood.buffers()), None) if self.likelihood is not None else None
        with torch.no_grad():
            return torch.as_tensor(operator(self._joined().to(device))).cpu()

    def check(self) -> dict[str, float | str]:
        """Compare the draws' residuals with the noise.

        Returns
        -------
            ``reduced_chi_square`` (mean over draws; expected near 1), its ``expected_spread`` for as many measured
            values, and a ``verdict``: "consistent", "misfit" (above: too little noise stated, or model wrong) or
            "overfit" (below).
        """
        count = int(self.about.get("measurements", 0)) or (self.likelihood.measurements if self.likelihood else 0)
        if not count:
            raise CapabilityError("The number of measured values is not known; this solution cannot be checked.")
        ratio = float(self.deviance.mean()) / count
        spread = (2.0 / count) ** 0.5
        # Draws and truth have one joint law with the measurement, so that exact draws have the noise's chi-square; a
        # tenth is allowed for what prior and sampler lack.
        band = 0.1 + 4.0 * spread
        verdict = "misfit" if ratio > 1 + band else "overfit" if ratio < 1 - band else "consistent"
        return {"reduced_chi_square": ratio, "expected_spread": spread, "verdict": verdict}

    def score(self, reference: Values | None = None) -> dict[str, float]:
        """Scores against a truth, the problem's if none is given; prefixed by variable where there are several.

        Raises
        ------
        InputError
            If there is no truth.
        ShapeError
            If it does not fit the event.
        """
        truth = self.reference if reference is None else _by_name(reference, self.event)
        if truth is None:
            raise InputError("There is no truth to score against; pass one: solution.score(truth).")
        scores: dict[str, float] = {}
        for v in self.event:
            if v.name not in truth or tuple(truth[v.name].shape) != v.shape:
                given = {name: tuple(t.shape) for name, t in truth.items()}
                raise ShapeError(f"A truth for {v.name!r} has shape {v.shape}; got {given}.")
            prefix = "" if len(self.event) == 1 else f"{v.name}/"
            own = metrics.score(self.by_chain[v.name].flatten(0, 1), truth[v.name])
            scores |= {prefix + name: value for name, value in own.items()}
        return scores

    def cite(self) -> str:
        """BibTeX of the method that made the draws."""
        return str(self.about.get("citation", ""))

    # Files and pictures.

    @cached_property
    def data(self) -> "xr.DataTree":
        """Everything as an xarray DataTree in ArviZ's schema."""
        from invdiff.solution_tree import to_tree

        return to_tree(self)

    def save(self, path: str | Path) -> Path:
        """Write a NetCDF-4 file, whole or not at all; `load` reads it back without loss.

        Raises
        ------
        InputError
            If the file cannot be written.
        """
        path = Path(path)
        with atomic_path(path) as partial:
            # HDF5 dies at exit after a write that failed for want of space: take the space first.
            reserve(partial, sum(node.dataset.nbytes for node in self.data.subtree))
            self.data.to_netcdf(partial, engine="h5netcdf")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Solution":
        """Read what `save` wrote.

        Raises
        ------
        InputError
            If the file is not there or not a solution.
        """
        from invdiff.solution_tree import read_solution

        return read_solution(Path(path))

    def plot(self, draws: int = 3) -> "Figure":
        """Measurement, mean, standard deviation, draws and truth, for pictures and one-dimensional events."""
        from invdiff.solution_plot import plot_solution

        return plot_solution(self, draws)

    def __repr__(self) -> str:
        names = ", ".join(f"{v.name} {v.shape}" for v in self.event)
        chains, draws = self.deviance.shape
        source = f"{self.about.get('problem', 'a problem')} by {self.about.get('sampler', '?')}"
        text = f"Solution of {source}: {chains} x {draws} draws of {names}"
        return f"<{text}, log evidence {self.log_evidence:.2f}>" if self.log_evidence is not None else f"<{text}>"

    # Within.

    def _each(self, function: Callable[[str], Tensor]) -> Values:
        values = {v.name: function(v.name) for v in self.event}
        return values[self.event[0].name] if len(self.event) == 1 else values

    def _joined(self) -> Tensor:
        if len(self.event) == 1:
            return self.by_chain[self.event[0].name].flatten(0, 1)
        return torch.cat([self.by_chain[v.name].flatten(0, 1).flatten(1) for v in self.event], dim=1)

    def provenance(self) -> dict[str, Any]:
        """Provenance as plain values for a file's attributes."""
        # NetCDF has no booleans.
        values = {k: int(v) if isinstance(v, bool) else v for k, v in self.about.items()}
        plain = {k: v if isinstance(v, (str, int, float)) else json.dumps(v, default=str) for k, v in values.items()}
        return plain | {"event": json.dumps([asdict(v) for v in self.event]), "is_chain": int(self.is_chain)}


def _by_name(values: Any, event: Event) -> dict[str, Tensor]:
    if isinstance(values, Tensor):
        sizes = [v.size for v in event]
        if len(event) == 1:
            values = {event[0].name: values}
        elif values.shape[-1:] == (sum(sizes),):
            # Several variables share one flat tensor in a problem's reference.
            lead = values.shape[:-1]
            values = {
                v.name: part.reshape(*lead, *v.shape)
                for v, part in zip(event, torch.tensor_split(values, _ends(sizes), dim=-1), strict=True)
            }
        else:
            raise ShapeError(
                f"Give a dict with the variables {[v.name for v in event]}, or a tensor of {sum(sizes)} values."
            )
    return dict(values)


def _ends(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(sizes))[:-1]


def _cpu(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu() for name, t in values.items()}


def _std(x: Tensor) -> Tensor:
    return x.std(0) if len(x) > 1 else torch.full_like(x[0], torch.nan)


def variables_from_json(text: str) -> Event:
    """Event from a file's attribute."""
    return tuple(
        Variable(
            name=v["name"],
            dims=tuple(v["dims"]),
            shape=tuple(v["shape"]),
            units=v["units"],
            coords={k: tuple(c) for k, c in v["coords"].items()},
        )
        for v in json.loads(text)
    )
