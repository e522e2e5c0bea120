"""Ranks of truths among their draws, and what follows from them: coverage, histograms, p-values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invdiff.diagnostics import calibration_ranks as statistics
from invdiff.errors import InputError
from invdiff.noise import stream_key

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVELS = (0.5, 0.9)
RELABELLINGS = 4000


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Share of truths inside a central interval of their draws, mean over a quantity's components.

    Parameters
    ----------
    level
        What exact draws give on average.
    value, se
        Mean over truths of the share of components inside, and its standard error over truths.
    low, high
        Its 95 % interval (Clopper & Pearson, on the effective number of independent values).
    """

    level: float
    value: float
    se: float
    low: float
    high: float

    @property
    def consistent(self) -> bool:
        """Whether the interval holds the level."""
        return self.low <= self.level <= self.high


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Ranks of one quantity in bins of equally many ranks, its components together.

    Parameters
    ----------
    counts
        Ranks in each bin, (bins,).
    expected
        Mean count of a bin for exact draws.
    low, high
        Band that holds all bins at once with a probability of about 95 % for exact draws, (bins,), from relabelled
        ranks, so that it allows for the dependence of the components.
    """

    counts: Tensor
    expected: float
    low: Tensor
    high: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """Ranks of truths among their draws, and what follows from them.

    Parameters
    ----------
    members
        By quantity, the ranks (truth, member, component), from 0 to draws, of all members of the set of a truth and its
        draws; member 0 is the truth.
    draws
        Draws of each truth.
    evaluations
        Network evaluations a draw.
    sampler
        Settings.
    seed
        Seed of the run.
    about
        Provenance of the first truth's solution.
    """

    members: Mapping[str, Tensor]
    draws: int
    evaluations: float
    sampler: str
    seed: int
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def truths(self) -> int:
        """Number of truths."""
        return len(next(iter(self.members.values())))

    @property
    def ranks(self) -> dict[str, Tensor]:
        """By quantity, ranks of the truths, 0 to draws, shape (truths, components)."""
        return {name: m[:, 0] for name, m in self.members.items()}

    def coverage(self, name: str, level: float = 0.9) -> Coverage:
        """Coverage of the central interval at a level.

        Raises
        ------
        InputError
            If there is no such quantity, or there are too few draws for the level.
        """
        tail = 0.5 * (1.0 - level) * (self.draws + 1)
        if not 0.0 < level < 1.0 or tail < 1.0 - 1e-9:
            raise InputError(f"A central interval of level {level:g} is more than {self.draws} draws tell.")
        per_truth = statistics.central_share(self._members(name)[:, 0], self.draws, level).mean(1)
        low, high = statistics.proportion_interval(per_truth)
        se = float(per_truth.std()) / self.truths**0.5
        return Coverage(level=level, value=float(per_truth.mean()), se=se, low=low, high=high)

    def histogram(self, name: str, bins: int | None = None) -> Histogram:
        """Histogram of a quantity's ranks.

        Parameters
        ----------
        name
            Quantity.
        bins
            A divisor of draws + 1; by default the largest, up to 16, that leaves five truths a bin, if there is one.

        Raises
        ------
        InputError
            If there is no such quantity, or bins does not divide draws + 1.
        """
        ranks, total = self._members(name), self.draws + 1
        divisors = [b for b in range(2, total + 1) if total % b == 0]
        if bins is None:
            bins = max((b for b in divisors if b <= 16 and 5 * b <= self.truths), default=divisors[0])
        if bins not in divisors:
            raise InputError(f"The number of bins must divide draws + 1 = {total} into equal bins, got {bins}.")
        again = statistics.relabelled(ranks, RELABELLINGS, self._generator())
        parts = torch.cat([ranks[None, :, 0], again]).flatten(1) // (total // bins)
        counts = torch.zeros(len(parts), bins, dtype=torch.int64).scatter_add_(1, parts, torch.ones_like(parts))
        expected = parts.shape[1] / bins
        spread = (counts[1:].double() - expected).square().mean(0).sqrt().clamp_min(1e-12)
        reach = ((counts[1:] - expected).abs() / spread).amax(1).quantile(0.95) * spread
        return Histogram(
            counts=counts[0], expected=expected, low=(expected - reach).clamp_min(0), high=expected + reach
        )

    def uniformity(self, name: str) -> float:
        """P-value of uniform ranks of one quantity, its components together.

        The smallest ``gamma`` of its components (see `calibration_ranks`) among those of relabelled ranks: exact but
        for the number of relabellings, whatever the dependence of the components, and at least 1 / (RELABELLINGS + 1).
        """
        self._members(name)
        return self._p_values[0][name]

    @property
    def p_value(self) -> float:
        """P-value of all quantities together: the smallest of their p-values, among those of relabelled ranks.

        It has the level that it states for any number of quantities and any dependence between them; no further
        correction for their number is due.
        """
        return self._p_values[1]

    def table(self) -> dict[str, dict[str, float]]:
        """Figures by quantity, plain numbers.

        ``components``; ``mean_rank`` in units of draws + 1 (0.5 for exact draws; below, the draws lie too high) with
        ``mean_rank_se``; ``coverage_50`` and ``coverage_90``, each with ``_se``, ``_low`` and ``_high``; ``p_value``.
        """
        rows = {}
        for name, ranks in self.ranks.items():
            place = ((ranks.double() + 0.5) / (self.draws + 1)).mean(1)
            row = {
                "components": ranks.shape[1],
                "mean_rank": float(place.mean()),
                "mean_rank_se": float(place.std()) / self.truths**0.5,
            }
            for level in LEVELS:
                c, key = self.coverage(name, level), f"coverage_{100 * level:.0f}"
                row |= {key: c.value, f"{key}_se": c.se, f"{key}_low": c.low, f"{key}_high": c.high}
            rows[name] = row | {"p_value": self.uniformity(name)}
        return rows

    def summary(self) -> dict[str, Any]:
        """Everything as plain values: truths, draws, evaluations, sampler, seed, overall p-value, `table`."""
        return {
            "truths": self.truths,
            "draws": self.draws,
            "evaluations": self.evaluations,
            "sampler": self.sampler,
            "seed": self.seed,
            "p_value": self.p_value,
            "quantities": self.table(),
        }

    def plot(self) -> "list[Axes]":
        """Rank histograms with their bands, and below each the ECDF of the ranks less that of uniform ranks.

        Returns
        -------
            Axes, all histograms first, in the order of `members`; ``axes[0].figure`` is the figure.
        """
        from invdiff.diagnostics.calibration_plot import plot_calibration

        return plot_calibration(self)

    def __str__(self) -> str:
        size = f"{self.truths} truths, {self.draws} draws, {self.evaluations:g} evaluations"
        lines = [f"{self.sampler}: {size}, p = {self.p_value:.3g}"]
        for name, row in self.table().items():
            shown = ", ".join(
                f"{k} {row[f'coverage_{k}']:.3f} [{row[f'coverage_{k}_low']:.3f}, {row[f'coverage_{k}_high']:.3f}]"
                for k in (50, 90)
            )
            lines.append(f"  {name}: mean rank {row['mean_rank']:.3f}, coverage {shown}, p = {row['p_value']:.3g}")
        return "\n".join(lines)

    # Within.

    def _members(self, name: str) -> Tensor:
        if name not in self.members:
            raise InputError(f"There is no quantity {name!r}; there are {', '.join(self.members)}.")
        return self.members[name]

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(stream_key(self.seed, "relabel") >> 1)

    @cached_property
    def _p_values(self) -> tuple[dict[str, float], float]:
        parts = list(self.members.values())
        sizes = [m.shape[2] for m in parts]
        every = torch.cat(parts, dim=2)
        # The same labels for all quantities: that is what keeps their dependence.
        rows = torch.cat([every[None, :, 0], statistics.relabelled(every, RELABELLINGS, self._generator())])
        gammas = torch.cat([statistics.surprise(block, self.draws) for block in torch.split(rows, 256)])
        smallest = torch.stack([g.amin(1) for g in torch.split(gammas, sizes, dim=1)], dim=1)
        by_group = statistics.p_values(smallest)
        overall = statistics.p_values(by_group.amin(1, keepdim=True))
        return dict(zip(self.members, by_group[0].tolist(), strict=True)), float(overall[0, 0])
