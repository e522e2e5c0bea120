"""A user's picture as a problem, simulated or as the measurement; and the grid that a prior can serve."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from invdiff import likelihoods
from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.event import image_event
from invdiff.images import read_image, resize_image
from invdiff.likelihoods import Gaussian, Poisson
from invdiff.operators.crop import Crop
from invdiff.operators.from_card import kernel_from_card, operator_from_card, seed_of
from invdiff.operators.inpainting import Inpainting
from invdiff.problem import Problem, problem_from_card, read_problem_card
from invdiff.solution import Solution

if TYPE_CHECKING:
    from invdiff.card_models import ProblemCard
    from invdiff.cli_solve import Request
    from invdiff.priors import MaskedNetworkPrior, NetworkPrior

Lines = list[tuple[str, str]]

_INSTRUMENTS = {
    "Blur": ("kernel", "--set operator.kernel=kernel.png"),
    "Inpainting": ("mask", "--set operator.mask=mask.png"),
    "Downsampling": ("factor", "--set operator.factor=4"),
    "HighDynamicRange": ("gain", "--set operator.gain=2"),
    "NonlinearBlur": ("kernel", "--set operator.kernel=kernel.png"),
}
"""Operators whose output is a picture: the part that must be known, and how to say it."""
_OTHERS = {
    "CompressedSensing": "random projections",
    "Tomography": "line integrals",
    "PhaseRetrieval": "Fourier magnitudes",
}
"""Operators whose output is no picture, and what it is."""


def picture_problem(
    request: "Request", operator: Mapping[str, Any], noise: Mapping[str, Any], *, grey: bool = False
) -> tuple[Problem, Lines]:
    """Build the problem that the command line asked for, and what to tell about it.

    With ``grey`` the user's picture is read as grey.

    Raises
    ------
    InvdiffError
        If the card, the picture or the operator's parameters are not what they should be.
    """
    from invdiff.card_equations import EquationCard
    from invdiff.card_models import ProblemCard

    if request.noise is not None and "std" in noise:
        raise InputError("--noise and --set noise.std say the same thing; give one of them.")
    settings = {f"operator.{k}": v for k, v in operator.items()} | {f"noise.{k}": v for k, v in noise.items()}
    if request.noise is not None:
        _refuse_photons(request, settings)
        settings["noise.std"] = request.noise
    card = read_problem_card(request.problem, settings)
    if isinstance(card, EquationCard):
        raise InputError(
            f"{card.name} is no problem of pictures: its unknown is a trajectory. Solve it in Python, under a prior of "
            f"such trajectories: invdiff.solve(invdiff.load_problem({card.name!r}, index=0), prior)."
        )
    if not isinstance(card, ProblemCard):
        raise InputError(
            f"{card.name} is no problem of pictures: it holds one measurement and brings a prior of its own. Solve it "
            f"in Python: invdiff.solve({card.name!r}, {card.name!r}, draws=1000)."
        )
    if request.image is None:
        if request.resize is not None:
            raise InputError("--resize is for a picture of your own; give one with --image.")
        problem = problem_from_card(card, request.index, seed=request.seed)
        return problem, [("picture", f"{card.data.set}, number {request.index}"), _told(card, problem, "simulated")]
    file = read_image(request.image, grey=grey)
    pixels, notes = file.pixels, list(file.notes)
    if request.resize is not None:
        if not request.simulate:
            raise InputError(
                "--resize would change the measurement's blur, mask or noise; shrink the picture before it is "
                "measured, or degrade it here with --simulate."
            )
        if request.resize < max(pixels.shape[1:]):
            pixels = resize_image(pixels, request.resize)
            notes.append(f"shrunk to {_size(pixels)}")
    if request.simulate:
        pixels = _cut(pixels, card, notes)
        problem = problem_from_card(card, request.index, pixels=pixels, seed=request.seed)
    else:
        _check_given(card, operator, noise, request)
        problem = _measured(pixels, card, request.index)
    told = _told(card, problem, "simulated on your picture" if request.simulate else "your picture is the measurement")
    return problem, [("picture", f"{request.image}, {_size(pixels)}: {'; '.join(notes)}"), told]


def _refuse_photons(request: "Request", settings: Mapping[str, Any]) -> None:
    from invdiff.card_models import override, read_values
    from invdiff.cards import find

    # The plain values: the card may be complete only with --noise.
    noise = override(read_values(find("problems", request.problem)), settings).get("noise")
    if isinstance(noise, dict) and noise.get("type") == "poisson":
        raise InputError(
            f"--noise is a standard deviation, but {request.problem} counts photons: set the mean counts of white with "
            f"--set noise.gain={noise.get('gain', 200)} and those of the dark with --set noise.background=1 instead."
        )


def _cut(pixels: Tensor, card: "ProblemCard", notes: list[str]) -> Tensor:
    """Cut the right and lower edges so that a down-sampling factor divides the sides."""
    if card.operator.type != "Downsampling":
        return pixels
    factor = card.operator.factor
    h, w = (side // factor * factor for side in pixels.shape[1:])
    if min(h, w) < 1:
        raise ShapeError(f"A picture of {_size(pixels)} pixels is smaller than the factor {factor}.")
    if (h, w) != tuple(pixels.shape[1:]):
        notes.append(f"cut to {w} x {h}, multiples of {factor}")
    return pixels[:, :h, :w]


def _check_given(
    card: "ProblemCard", operator: Mapping[str, Any], noise: Mapping[str, Any], request: "Request"
) -> None:
    """Without --simulate the card's example parameters are not those of the user's instrument: ask for them."""
    what = "photon counts" if card.noise.type == "poisson" else _OTHERS.get(card.operator.type)
    if what is not None:
        raise InputError(
            f"The measurement of {card.name} is {what}, which a picture's file cannot hold; let your picture be "
            "degraded first, with --simulate, or pass the measured values in Python, to invdiff.likelihoods."
        )
    part, example = _INSTRUMENTS[card.operator.type]
    missing = []
    if not any(key.split(".")[0] == part for key in operator):
        drawn = {"kernel": " or --set operator.kernel.seed=3", "mask": " or --set operator.mask.seed=3"}.get(part, "")
        if card.operator.type in ("Blur", "NonlinearBlur") and card.operator.kernel.type == "gaussian":
            drawn = " or --set operator.kernel.std=2"
        missing.append(f"the {part}, with {example}{drawn}")
    if request.noise is None and "std" not in noise:
        missing.append("the noise's standard deviation, with --noise 0.02")
    if missing:
        raise InputError(
            f"Your picture is taken as the measurement, so its instrument must be known: give {' and '.join(missing)}; "
            "or let the picture be degraded first, with --simulate."
        )


def _measured(pixels: Tensor, card: "ProblemCard", index: int) -> Problem:
    """Take a picture as the measurement."""
    from invdiff.card_models import card_hash

    shape = _unknown_shape(pixels, card, index)
    operator = operator_from_card(card.operator, shape, index)
    assert card.noise.type == "gaussian"  # checked before
    y = operator(pixels[None])[0] if isinstance(operator, Inpainting) else pixels
    return Problem(
        likelihoods.Gaussian(operator, y, card.noise.std),
        event=image_event(shape),
        name=card.name,
        card=card.model_dump(mode="json") | {"index": index, "hash": card_hash(card)},
    )


def _unknown_shape(pixels: Tensor, card: "ProblemCard", index: int) -> tuple[int, int, int]:
    """Shape of the picture whose measurement has the shape of ``pixels``."""
    c, h, w = pixels.shape
    if card.operator.type == "Downsampling":
        return c, h * card.operator.factor, w * card.operator.factor
    if card.operator.type in ("Blur", "NonlinearBlur") and card.operator.boundary == "valid":
        kh, kw = kernel_from_card(card.operator.kernel, index).shape
        return c, h + kh - 1, w + kw - 1
    return c, h, w


def padded(shape: tuple[int, ...], prior: "NetworkPrior") -> tuple[int, int, int]:
    """Find the smallest grid that holds a picture and that the prior's network can serve.

    Raises
    ------
    ShapeError
        If the prior has another number of channels.
    """
    if shape[0] != prior.shape[0]:
        raise ShapeError(f"The picture has {shape[0]} channels, the prior {prior.name!r} {prior.shape[0]}.")
    stride = int(getattr(prior.network, "stride", 1))
    h, w = (-(-side // stride) * stride for side in shape[1:])
    return shape[0], h, w


def decoded(shape: tuple[int, ...], prior: "MaskedNetworkPrior") -> tuple[int, int, int]:
    """Return a picture's shape where it is the one that a prior's tokens decode to.

    Raises
    ------
    CapabilityError
        If the tokens do not decode to pictures.
    ShapeError
        If they decode to pictures of another shape.
    """
    if prior.tokenizer is None:
        raise CapabilityError(
            f"{prior.name} is a prior of sequences; this command takes pictures. From Python, "
            "invdiff.solve(problem, prior) takes it."
        )
    channels, h, w = prior.detokeniser.out_shape
    if shape != (channels, h, w):
        kind = "grey" if channels == 1 else f"{channels} channels"
        raise ShapeError(
            f"The tokens of {prior.name} decode to pictures of {w} x {h}, {kind}, and to no others; this one has shape "
            f"{shape}. Give a picture of that shape with --image, or take a diffusion prior, e.g. photos-64."
        )
    return channels, h, w


def on_grid(problem: Problem, grid: tuple[int, int, int]) -> Problem:
    """Take the measurement as one of a window of a larger scene: the margin is unknown and not measured."""
    likelihood = problem.likelihood
    if tuple(likelihood.in_shape) == grid:
        return problem
    if not isinstance(likelihood, (Gaussian, Poisson)):
        raise InputError("Only problems with Gaussian noise or photon counts can be put on a larger grid.")
    h, w = likelihood.in_shape[1:]
    operator, y = likelihood.operator @ Crop(grid, (h, w)), likelihood.measurement[0]
    larger = (
        Gaussian(operator, y, likelihood.noise_std)
        if isinstance(likelihood, Gaussian)
        else Poisson(operator, y, likelihood.gain, likelihood.background)
    )
    return Problem(
        larger,
        event=image_event(grid),
        name=problem.name,
        card=problem.card,
    )


def off_grid(solution: Solution, problem: Problem) -> Solution:
    """Cut a solution to the problem's own grid, and give it the problem's likelihood and truth."""
    shape, event = tuple(problem.likelihood.in_shape), problem.event
    if solution.event[0].shape == shape:
        return solution
    window = Crop(solution.event[0].shape, (shape[1], shape[2]))  # type: ignore[arg-type]  # a picture's three axes

    def cut(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        (x,) = values.values()
        return {event[0].name: window.forward(x).clone()}

    return replace(
        solution,
        event=event,
        by_chain=cut(solution.by_chain),
        particles=None if solution.particles is None else cut(solution.particles),
        likelihood=problem.likelihood.to("cpu"),
    ).with_reference(problem.reference)


def _told(card: "ProblemCard", problem: Problem, how: str) -> tuple[str, str]:
    """Say in words what the operator and the noise are."""
    operator, index, words = card.operator, int(problem.card["index"]), []
    for name, part in operator:
        if name in ("kernel", "mask"):
            words += (
                [f"{name} {Path(part.path).name}"]
                if part.type == "file"
                else _words(part, index, f"{part.type} {name}")
            )
    words += _words(operator, index)
    noise = (
        f"noise {card.noise.std:g}"
        if card.noise.type == "gaussian"
        else f"photon counts, {card.noise.gain:g} for white, {card.noise.background:g} in the dark"
    )
    return "problem", f"{card.name}: {operator.type} ({', '.join(words)}), {noise}; {how}"


def _words(part: Any, index: int, *first: str) -> list[str]:
    """Say the settings of an operator, kernel or mask, without its own parts, and the seed that it follows."""
    hidden = {"type", "kernel", "mask", "seed", "seeds"}
    words = [*first, *(f"{k} {v}" for k, v in part.model_dump(exclude=hidden, exclude_none=True).items())]
    if hasattr(part, "seeds") and not getattr(part, "centred", False):
        words.append(f"seed {seed_of(part, index)}")
    return words


def _size(pixels: Tensor) -> str:
    return f"{pixels.shape[-1]} x {pixels.shape[-2]}"
