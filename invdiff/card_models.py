"""The fields of the catalogue's cards, and what they may hold; this is where pydantic loads."""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from copy import deepcopy
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from invdiff.errors import CatalogueError, InputError

# Strict: TOML has numbers, so that text or a truth value in a number's place is a mistake.
Positive = Annotated[float, Field(strict=True, gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(strict=True, ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=1)]
Index = Annotated[int, Field(strict=True, ge=0)]
Flag = Annotated[bool, Field(strict=True)]


class _Card(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GaussianKernel(_Card):
    """A Gaussian point-spread function; std in pixels."""

    type: Literal["gaussian"]
    size: Count
    std: Positive


class MotionKernel(_Card):
    """A camera-shake path; without a seed it follows the index, modulo `seeds`."""

    type: Literal["motion"]
    size: Annotated[int, Field(ge=3)]
    intensity: Annotated[float, Field(strict=True, ge=0.0, le=1.0)] = 0.5
    seed: Index | None = None
    seeds: Count = 8


class FileKernel(_Card):
    """A picture of the point-spread function, normalised to sum 1."""

    type: Literal["file"]
    path: str


class RandomMask(_Card):
    """Pixels observed at random; without a seed it follows the index, modulo `seeds`."""

    type: Literal["random"]
    observed: Annotated[float, Field(strict=True, gt=0.0, le=1.0)]
    seed: Index | None = None
    seeds: Count = 8


class BoxMask(_Card):
    """A missing box, its side a share of the picture's shorter side, placed by a seed; in the centre with `centred`."""

    type: Literal["box"]
    side: Annotated[float, Field(strict=True, gt=0.0, lt=1.0)] = 0.5
    centred: Flag = False
    seed: Index | None = None
    seeds: Count = 8


class FileMask(_Card):
    """A picture of the mask, white where observed."""

    type: Literal["file"]
    path: str


Kernel = Annotated[GaussianKernel | MotionKernel | FileKernel, Field(discriminator="type")]
Boundary = Literal["circular", "reflect", "zero", "valid"]


class BlurCard(_Card):
    """Convolution."""

    type: Literal["Blur"]
    kernel: Kernel
    boundary: Boundary = "reflect"


class InpaintingCard(_Card):
    """Missing pixels."""

    type: Literal["Inpainting"]
    mask: Annotated[RandomMask | BoxMask | FileMask, Field(discriminator="type")]


class DownsamplingCard(_Card):
    """Anti-aliased bicubic down-sampling."""

    type: Literal["Downsampling"]
    factor: Annotated[int, Field(strict=True, ge=2)]


class CompressedSensingCard(_Card):
    """Random measurements, `ratio` times as many as values; without a seed it follows the index, modulo `seeds`."""

    type: Literal["CompressedSensing"]
    ratio: Annotated[float, Field(strict=True, gt=0.0, le=1.0)]
    kind: Literal["fourier", "gaussian"] = "fourier"
    seed: Index | None = None
    seeds: Count = 8


def _angles(value: object) -> int | tuple[float, ...]:
    # By hand: a union's errors would name its branches, which mean nothing to whoever wrote the card.
    if isinstance(value, list | tuple):
        degrees = [float(v) for v in value if isinstance(v, int | float) and not isinstance(v, bool) and isfinite(v)]
        if len(degrees) == len(value) > 0:
            return tuple(degrees)
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError("the angles are their number, at least 1, or a flat list of finite degrees")


class TomographyCard(_Card):
    """Line integrals along parallel rays; angles is their number in half a turn, or a list of degrees."""

    type: Literal["Tomography"]
    angles: Annotated[int | tuple[float, ...], BeforeValidator(_angles)]
    detectors: Count | None = None


class HighDynamicRangeCard(_Card):
    """Contrast amplified and clipped."""

    type: Literal["HighDynamicRange"]
    gain: Positive = 2.0


class NonlinearBlurCard(_Card):
    """Camera shake in linear light that saturates and is gamma-encoded."""

    type: Literal["NonlinearBlur"]
    kernel: Kernel
    boundary: Boundary = "reflect"
    gamma: Annotated[float, Field(strict=True, ge=1.0, allow_inf_nan=False)] = 2.2
    exposure: Positive = 1.5
    knee: Positive = 0.1


class PhaseRetrievalCard(_Card):
    """Magnitudes of the oversampled Fourier transform."""

    type: Literal["PhaseRetrieval"]
    oversampling: NotNegative = 2.0


Row = tuple[float, ...]
Matrix = tuple[Row, ...]


class DenseCard(_Card):
    """A matrix on flattened inputs, a row a measured value."""

    type: Literal["Dense"]
    matrix: Matrix


class IdentityCard(_Card):
    """Every value of the unknown."""

    type: Literal["Identity"]


class ParityCard(_Card):
    """Exclusive or of some bits; each check is a list of their numbers, from 0."""

    type: Literal["Parity"]
    checks: tuple[tuple[Index, ...], ...]


OperatorCard = Annotated[
    BlurCard
    | InpaintingCard
    | DownsamplingCard
    | CompressedSensingCard
    | TomographyCard
    | HighDynamicRangeCard
    | NonlinearBlurCard
    | PhaseRetrievalCard
    | DenseCard
    | IdentityCard
    | ParityCard,
    Field(discriminator="type"),
]


class GaussianNoise(_Card):
    """Gaussian noise; std in the measurement's units, for pictures in [0, 1]."""

    type: Literal["gaussian"] = "gaussian"
    std: Positive


class PoissonNoise(_Card):
    """Photon counts: gain is the mean count of one unit of the operator's output, background that of the dark."""

    type: Literal["poisson"]
    gain: Positive
    background: NotNegative = 1e-3


class FlipNoise(_Card):
    """Bits, each flipped with this probability."""

    type: Literal["flips"]
    probability: Annotated[float, Field(strict=True, ge=0.0, lt=0.5)]


def _gaussian_unless_said(value: object) -> object:
    return {"type": "gaussian"} | dict(value) if isinstance(value, Mapping) else value


Noise = Annotated[
    Annotated[GaussianNoise | PoissonNoise, Field(discriminator="type")], BeforeValidator(_gaussian_unless_said)
]


InstanceNoise = Annotated[
    Annotated[GaussianNoise | FlipNoise, Field(discriminator="type")], BeforeValidator(_gaussian_unless_said)
]


class ProblemData(_Card):
    """Which pictures, and how large."""

    set: str
    side: Count


class ProblemCard(_Card):
    """A benchmark problem."""

    name: str
    version: Index
    title: str
    description: str
    operator: OperatorCard
    noise: Noise
    data: ProblemData
    metrics: tuple[str, ...] = ("psnr_mean", "psnr_draw", "ssim_mean", "crps", "coverage_90", "spread_skill")


class MarkovChainTable(_Card):
    """Markov chain of tokens, and the vector of each."""

    type: Literal["MarkovChain"]
    length: Count
    initial: Row
    transition: Matrix
    codebook: Matrix | None = None


class IsingTable(_Card):
    """Ising spins on a grid (height, width), free boundaries."""

    type: Literal["Ising"]
    shape: tuple[Count, Count]
    coupling: Annotated[float, Field(strict=True, allow_inf_nan=False)]


class ProductMixtureTable(_Card):
    """Mixture of laws of independent tokens, (components, length, kinds); shape is that of the unknown."""

    type: Literal["ProductMixture"]
    weights: Row
    probabilities: tuple[Matrix, ...]
    codebook: Matrix | None = None
    shape: tuple[Count, ...] | None = None


PriorTable = Annotated[MarkovChainTable | IsingTable | ProductMixtureTable, Field(discriminator="type")]


class InstanceCard(_Card):
    """A problem with one fixed measurement and a prior of its own, under which its posterior is known."""

    name: str
    version: Index
    title: str
    description: str
    prior: PriorTable
    operator: OperatorCard
    noise: InstanceNoise
    measurement: Row
    truth: Row


class BurgersTable(_Card):
    """Cases of viscous Burgers' equation: a published setting, parts of it replaced where they are given.

    Cases are held out by their seed; training takes seed 0. `refine` is the number of cells in a control cell of the
    solver that makes the data and judges.
    """

    type: Literal["Burgers"]
    setting: str
    partial: Literal["none", "control", "observation", "both"] = "none"
    points: Annotated[int, Field(strict=True, ge=5)] | None = None
    windows: Count | None = None
    duration: Positive | None = None
    viscosity: Positive | None = None
    narrow: Positive | None = None
    scale: Positive | None = None
    seed: Index = 1
    cases: Count = 50
    refine: Count = 4


class ControlTable(_Card):
    """A cost to be low: mean squared distance from the target, and weight times the sum of the squared forcing.

    The final state is the trajectory's own or, with `solver`, what a solver with `refine` cells in a control cell makes
    of the forcing. The likelihood is exp(-J / temperature). Without a solver that is a Gaussian one of the target and
    of no forcing; with `quadratic` it is handed over as such, so that samplers run which need linear measurements.
    """

    weight: NotNegative
    temperature: Positive
    solver: Flag = False
    refine: Count = 2
    quadratic: Flag = False

    @model_validator(mode="after")
    def _is_quadratic(self) -> Self:
        """Check that a cost through the solver is not taken for a quadratic one."""
        if self.quadratic and self.solver:
            raise ValueError("the cost is quadratic without a solver alone; give quadratic or solver")
        return self


class SensorsTable(_Card):
    """Sensors of the state in `count` cells, by index, or in all; read at the ends of windows `first` to `last`.

    Number 0 is the initial state; every so-manieth is read.
    """

    count: Count | None = None
    first: Index = 0
    last: Index | None = None
    every: Count = 1
    noise_std: Positive


class EquationCard(_Card):
    """A problem of trajectories that obey a differential equation."""

    name: str
    version: Index
    title: str
    description: str
    equation: BurgersTable
    given: tuple[Literal["initial", "target", "state", "forcing"], ...]
    control: ControlTable | None = None
    sensors: SensorsTable | None = None

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        """Check that there is either something to reach or something measured."""
        if (self.control is None) == (self.sensors is None):
            raise ValueError("a problem of an equation has either a table control or a table sensors")
        return self


class DataFile(_Card):
    """A file of a data set."""

    name: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    count: Count | None = None
    url: str | None = None


class DataEntry(_Card):
    """A picture inside an installed package: its file, and the square (left, top, side) that is taken."""

    file: str
    box: tuple[Index, Index, Count]


class DataCard(_Card):
    """A data set: where it comes from, and how it is read."""

    name: str
    version: Index
    title: str
    source: str
    licence: str
    attribution: str = ""
    reader: Literal["skimage", "tiles", "folder", "sequences"]
    files: tuple[DataFile, ...] = ()
    entries: tuple[DataEntry, ...] = ()
    side: Count | None = None
    columns: Count | None = None
    splits: Mapping[str, tuple[Index, Index]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        """Check that the reader finds what it needs, and that the splits lie inside the files."""
        if self.reader == "skimage" and not self.entries:
            raise ValueError("the reader 'skimage' needs entries")
        counts = [f.count for f in self.files if f.count is not None]
        if self.reader == "tiles" and (None in (self.side, self.columns) or not 0 < len(self.files) == len(counts)):
            raise ValueError("the reader 'tiles' needs side, columns, and files with a count each")
        for name, (first, last) in self.splits.items():
            if first >= last or (self.reader == "tiles" and last > sum(counts)):
                raise ValueError(f"the split {name!r} from {first} to {last} is empty or ends after the last picture")
        return self


Card = ProblemCard | InstanceCard | EquationCard | DataCard
MODELS: Mapping[str, type[Card]] = {"problems": ProblemCard, "data": DataCard}
"""Priors' cards are plain: `invdiff.priors.loading.read_card`."""


_UNIONS = {"operator", "kernel", "mask", "noise", "prior"}


def _explain(error: ValidationError) -> str:
    lines = []
    for e in error.errors():
        loc = [str(part) for part in e["loc"]]
        # After a field that holds one of several types stands the type's name, which is no field.
        field = ".".join(part for before, part in zip(["", *loc], loc, strict=False) if before not in _UNIONS)
        what = "is not a field of this card" if e["type"] == "extra_forbidden" else e["msg"][:1].lower() + e["msg"][1:]
        what = what.removeprefix("value error, ")
        # A whole table is no help.
        given = "" if isinstance(e["input"], Mapping) or e["type"] == "extra_forbidden" else f", got {e['input']!r}"
        lines.append(f"{field or 'the card'}: {what}{given}")
    return "; ".join(lines)


def validate(values: Mapping[str, Any], kind: str, where: str) -> Card:
    """Check plain values and make a card of them; `where` names their origin in errors.

    Raises
    ------
    InputError
        If a field is missing, mistyped or unknown: the origin and the field are named.
    """
    if kind not in MODELS:
        raise CatalogueError.unknown("kind of card", kind, MODELS)
    model = MODELS[kind]
    if kind == "problems":
        model = InstanceCard if "prior" in values else EquationCard if "equation" in values else model
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise InputError(f"{where}: {_explain(error)}.") from None


def read_values(path: Path) -> dict[str, Any]:
    """Read the plain values of a TOML file.

    Raises
    ------
    InputError
        If it cannot be read or is no TOML; the line is named.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read the card {path}: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"The card {path} is no TOML: {error}.") from error


def read_card(path: Path, kind: str) -> Card:
    """Read and check a card of a kind: "problems" or "data"."""
    return validate(read_values(path), kind, str(path))


def override(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Replace some of a card's values by dotted name, e.g. ``{"noise.std": 0.1}``.

    A kernel or mask may be given as a file's path: ``{"operator.kernel": "kernel.png"}``.

    Raises
    ------
    InputError
        If a name leads through something that is no table.
    """
    result = deepcopy(dict(values))
    for name, value in settings.items():
        *path, last = name.split(".")
        table = result
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise InputError(f"{name}: {part} is a value, not a table of settings.")
        is_file = last in ("kernel", "mask") and isinstance(value, str | Path)
        table[last] = {"type": "file", "path": str(value)} if is_file else value
    return result


def card_hash(card: BaseModel) -> str:
    """Hash a card's content, defaults included: SHA-256, hexadecimal; the file's layout and comments do not enter."""
    return hashlib.sha256(json.dumps(card.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
