"""A problem: what was measured and how, about which unknown."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invdiff import likelihoods
from invdiff.errors import InputError, ShapeError
from invdiff.event import Event, image_event, plain_event
from invdiff.likelihoods import Likelihood
from invdiff.likelihoods.poisson import poisson_quantile
from invdiff.noise import Noise, stream_key
from invdiff.operators.base import Operator, fingerprint

if TYPE_CHECKING:
    from invdiff.card_equations import EquationCard
    from invdiff.card_models import InstanceCard, ProblemCard


@dataclass(frozen=True, eq=False)
class Problem:
    r"""A measurement and its likelihood.

    Parameters
    ----------
    likelihood
        ``p(y | x)`` with the measurement in it; holds one measurement.
    event
        The unknown; a picture or numbered axes of the likelihood's in_shape if None.
    given
        Known variables by name (initial state, forcing), physical units.
    reference
        The truth, (\*shape), physical units, for scoring. No posterior can reach it.
    name, card
        Name and card for the provenance.

    Raises
    ------
    ShapeError
        If the likelihood holds several measurements, or the reference does not fit the event.
    """

    likelihood: Likelihood
    event: Event = ()
    given: Mapping[str, Tensor] = field(default_factory=dict)
    reference: Tensor | None = None
    name: str = "problem"
    card: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.likelihood.problems != 1:
            raise ShapeError(
                f"A problem holds one measurement, this likelihood {self.likelihood.problems}; "
                "pass solve a list of problems instead."
            )
        if not self.event:
            object.__setattr__(self, "event", plain_event(self.likelihood.in_shape))
        if len(self.event) == 1 and self.event[0].shape != tuple(self.likelihood.in_shape):
            raise ShapeError(
                f"The event has shape {self.event[0].shape}, the likelihood takes {tuple(self.likelihood.in_shape)}."
            )
        if self.reference is not None and tuple(self.reference.shape) != tuple(self.likelihood.in_shape):
            raise ShapeError(
                f"The reference has shape {tuple(self.reference.shape)}, the unknown {tuple(self.likelihood.in_shape)}."
            )

    @property
    def key(self) -> str:
        """Hash of likelihood, measurement and given variables: equal problems get equal noise wherever they stand."""
        digest = hashlib.sha256(fingerprint(self.likelihood).encode())
        for name, value in sorted(self.given.items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def simulate(
        cls,
        operator: Operator,
        truth: Tensor,
        *,
        noise_std: float | Tensor | None = None,
        gain: float | None = None,
        background: float | None = None,
        seed: int = 0,
        name: str = "simulated",
        **settings: Any,
    ) -> "Problem":
        r"""Degrade a truth: ``y = A(x) + noise_std * eps`` or counts; the truth is kept as the reference.

        Parameters
        ----------
        operator
            Measurement operator A.
        truth
            x, (\*in_shape) or (1, \*in_shape), physical units (pictures in [0, 1]), real and finite.
        noise_std
            Gaussian noise of this standard deviation: positive, in the measurement's units; a scalar or a tensor that
            broadcasts to one measurement.
        gain, background
            Photon counts ``y ~ Poisson(gain * max(A(x), 0) + background)`` in place of Gaussian noise: counts for one
            unit of A's output, and mean dark counts, `likelihoods.Poisson`'s default if None.
        seed
            Seed of the measurement's noise. Counts are drawn on the CPU, one from each of the stream's uniforms.
        name, settings
            Passed on to Problem.

        Raises
        ------
        ShapeError
            If the truth does not fit the operator.
        InputError
            If the truth is complex or not finite, or not just one of noise_std and gain is given, or out of its range.
        """
        if tuple(truth.shape) == (1, *operator.in_shape):
            truth = truth[0]
        if tuple(truth.shape) != operator.in_shape:
            raise ShapeError(
                f"The truth has shape {tuple(truth.shape)}, {type(operator).__name__} takes {operator.in_shape}."
            )
        if truth.is_complex():
            raise InputError("The unknown is real, this truth complex; give real and imaginary parts as two channels.")
        if not bool(torch.isfinite(truth).all()):
            raise InputError("The truth holds values that are not finite.")
        if (noise_std is None) == (gain is None) or (gain is None and background is not None):
            raise InputError("Give noise_std for Gaussian noise, or gain (and background) for photon counts.")
        if noise_std is not None and not bool((torch.as_tensor(noise_std) > 0).all()):
            raise InputError(
                f"noise_std must be positive, got {noise_std}. For noiseless data give a small value, e.g. 1e-3."
            )
        if gain is not None:
            counts = _photon_counts(operator, truth[None], gain, 1e-3 if background is None else background, seed)
            return cls(counts, reference=truth, name=name, **settings)
        assert noise_std is not None
        std = noise_std.to(truth) if isinstance(noise_std, Tensor) else noise_std
        with torch.no_grad():
            clean = operator(truth[None])
        noise = Noise([stream_key(seed, "measurement")], 1, device=clean.device, dtype=torch.float64)
        if clean.is_complex():
            eps = torch.view_as_complex(noise.normal(noise.slots, (*clean.shape[1:], 2)).contiguous()).to(clean.dtype)
        else:
            eps = noise.normal(noise.slots, clean.shape[1:]).to(clean.dtype)
        likelihood = likelihoods.Gaussian(operator, clean + std * eps, noise_std)
        return cls(likelihood, reference=truth, name=name, **settings)


def _photon_counts(operator: Operator, x: Tensor, gain: float, background: float, seed: int) -> likelihoods.Poisson:
    """Likelihood of counts drawn at x (1, *in_shape)."""
    shape = (1, *operator.out_shape)
    law = likelihoods.Poisson(operator, torch.zeros(shape, dtype=x.dtype, device=x.device), gain, background)
    with torch.no_grad():
        rate = law.rate(x)
    # On the CPU in float64: a device's rounding could at most move a count whose uniform lies that close to a step.
    noise = Noise([stream_key(seed, "measurement")], 1, dtype=torch.float64)
    counts = poisson_quantile(noise.uniform(noise.slots, operator.out_shape), rate.cpu().double())
    return likelihoods.Poisson(operator, counts.to(rate), gain, background)


def load_problem(card: str | Path, index: int = 0, *, data: str | Path | None = None, **overrides: Any) -> Problem:
    """Build a benchmark problem from a card of ``problems/``, or from a path to one.

    Parameters
    ----------
    card
        Name or path.
    index
        Which of the data set's pictures, or of an equation's cases; also seeds kernels, masks, sensors and noise where
        the card says so. 0 for a problem with one fixed measurement.
    data
        Folder of the data set's files, where they are not part of an installed package; environment variable
        INVDIFF_DATA if None.
    overrides
        Settings by dotted name with ``.`` written as ``__``, e.g. ``noise__std=0.1``.

    Raises
    ------
    CatalogueError
        If there is no such card.
    InputError
        If the card has a mistyped field, or the data, or a case of that index, are not there.
    """
    settings = {name.replace("__", "."): value for name, value in overrides.items()}
    found = read_problem_card(card, settings)
    from invdiff.card_equations import EquationCard
    from invdiff.card_models import InstanceCard

    if isinstance(found, InstanceCard):
        return instance_from_card(found, index)
    if isinstance(found, EquationCard):
        return trajectory_problem_from_card(found, index)
    return problem_from_card(found, index, data=data)


def read_problem_card(
    card: str | Path, settings: Mapping[str, Any] | None = None
) -> "ProblemCard | InstanceCard | EquationCard":
    """Card of a problem by name or path, some of its settings replaced by dotted name.

    Files that the card names are sought beside it; files in the settings, from the working folder.

    Raises
    ------
    CatalogueError
        If there is no such card.
    InputError
        If there is no card at a path, or a field is mistyped, missing or unknown.
    """
    from invdiff.card_models import DataCard, override, read_values, validate
    from invdiff.cards import find

    path = find("problems", card)
    values = read_values(path)
    _beside(values, path.parent)
    where = str(path) + (f" with {', '.join(f'{k} = {v!r}' for k, v in settings.items())}" if settings else "")
    found = validate(override(values, settings or {}), "problems", where)
    assert not isinstance(found, DataCard)
    return found


def _beside(values: dict[str, Any], folder: Path) -> None:
    """Make the paths in a card's values absolute: kernels, masks and the data set's own card."""
    operator, data = values.get("operator"), values.get("data")
    parts = [operator.get(key) for key in ("kernel", "mask")] if isinstance(operator, dict) else []
    for table, key in [*((part, "path") for part in parts), (data, "set")]:
        name = table.get(key, "") if isinstance(table, dict) else ""
        if isinstance(table, dict) and isinstance(name, str) and name and (key == "path" or name.endswith(".toml")):
            table[key] = str(folder / name)


def problem_from_card(
    card: "ProblemCard",
    index: int = 0,
    *,
    data: str | Path | None = None,
    pixels: Tensor | None = None,
    seed: int = 0,
) -> Problem:
    r"""Simulate a card's problem.

    Parameters
    ----------
    card
        From `read_problem_card`.
    index
        Which of the data set's pictures; seeds kernels and masks too, and the noise together with the card's name, so
        that every sampler sees the same measurement.
    data
        Folder of the data set's files; environment variable INVDIFF_DATA if None.
    pixels
        A picture (c, h, w) in [0, 1] to take in place of the data set's.
    seed
        Another seed is another noise.

    Raises
    ------
    ShapeError
        If the operator does not fit the picture.
    InputError
        If the picture or a file is not there.
    """
    from invdiff.card_models import card_hash
    from invdiff.operators.from_card import operator_from_card

    if index < 0:
        raise InputError(f"The index counts from 0, got {index}.")
    if pixels is None:
        from invdiff.images import load_data_card, load_image

        pixels = load_image(load_data_card(card.data.set), index, card.data.side, data=data)
    c, h, w = pixels.shape
    noise = card.noise
    return Problem.simulate(
        operator_from_card(card.operator, (c, h, w), index),
        pixels,
        noise_std=noise.std if noise.type == "gaussian" else None,
        gain=noise.gain if noise.type == "poisson" else None,
        background=noise.background if noise.type == "poisson" else None,
        seed=stream_key(seed, card.name, index),
        name=card.name,
        card=card.model_dump(mode="json") | {"index": index, "hash": card_hash(card)},
        event=image_event((c, h, w)),
    )


def instance_from_card(card: "InstanceCard", index: int = 0) -> Problem:
    """Make the problem of a card that holds its measurement; float64.

    Its prior is ``load_prior`` of the same name.

    Raises
    ------
    ShapeError
        If operator, measurement and truth do not fit the prior's unknown.
    InputError
        If the index is not 0: there is one measurement.
    """
    from invdiff.card_models import card_hash
    from invdiff.operators.from_card import operator_from_card
    from invdiff.priors.from_card import prior_from_card

    if index != 0:
        raise InputError(f"{card.name} is one measurement, number 0; got {index}.")
    shape = prior_from_card(card.prior).detokeniser.out_shape
    operator = operator_from_card(card.operator, shape)
    sizes = (len(card.measurement), len(card.truth))
    if sizes != (prod(operator.out_shape), prod(shape)):
        raise ShapeError(
            f"{card.name} needs a measurement of {prod(operator.out_shape)} values and a truth of {prod(shape)}, got "
            f"{sizes[0]} and {sizes[1]}."
        )
    y = torch.tensor(card.measurement, dtype=torch.float64).reshape(operator.out_shape)
    noise = card.noise
    likelihood: Likelihood = (
        likelihoods.Gaussian(operator, y, noise.std)
        if noise.type == "gaussian"
        else likelihoods.BinarySymmetric(operator, y, noise.probability)
    )
    return Problem(
        likelihood,
        reference=torch.tensor(card.truth, dtype=torch.float64).reshape(shape),
        name=card.name,
        card=card.model_dump(mode="json") | {"index": index, "hash": card_hash(card)},
    )


def trajectory_problem_from_card(card: "EquationCard", index: int = 0, *, seed: int = 0) -> Problem:
    """Make the problem of a card of a differential equation; float64.

    What is known stands in ``given``, as a prior's ``condition`` takes it; the reference is the case's own trajectory.

    Parameters
    ----------
    card
        From `read_problem_card`.
    index
        Which of the card's cases; sensors and noise follow it and the card's name.
    seed
        Another seed is another noise.

    Raises
    ------
    CatalogueError
        If there is no such setting of the equation.
    InputError
        If there is no such case, or the sensors do not fit the grid.
    """
    from invdiff.card_equations import AdvectionTable, BurgersTable
    from invdiff.card_models import card_hash
    from invdiff.pde.advection_cards import advection_case
    from invdiff.pde.burgers_cards import BurgersCase, burgers_case, burgers_cost
    from invdiff.pde.burgers_control import TrajectoryCost
    from invdiff.pde.flow_cards import flow_case
    from invdiff.pde.trajectory_cases import TrajectoryCase, state_sensors

    case: BurgersCase | TrajectoryCase
    if isinstance(card.equation, BurgersTable):
        case = burgers_case(card.equation, index)
    elif isinstance(card.equation, AdvectionTable):
        case = advection_case(card.equation, index)
    else:
        case = flow_case(card.equation, index)
    about: dict[str, Any] = {
        "event": case.event,
        "given": {name: case.known[name] for name in card.given},
        "name": card.name,
        "card": card.model_dump(mode="json") | {"index": index, "hash": card_hash(card)},
    }
    if card.sensors is not None:
        sensors = state_sensors(card.sensors, case.event, stream_key(0, card.name, index, "sensors"))
        noise = stream_key(seed, card.name, index)
        return Problem.simulate(sensors, case.truth, noise_std=card.sensors.noise_std, seed=noise, **about)
    # The card has checked that only what is forced is controlled.
    assert card.control is not None and isinstance(case, BurgersCase)
    cost = burgers_cost(card.control, case, card.control.refine)
    J = TrajectoryCost(cost, solve=card.control.solver)
    T = card.control.temperature
    likelihood: Likelihood = (
        likelihoods.Gaussian(*J.measurement(T)) if card.control.quadratic else likelihoods.Objective(J, T, J.in_shape)
    )
    return Problem(likelihood, reference=case.truth, **about)
