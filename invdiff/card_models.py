"""The fields of the catalogue's cards, and what they may hold; this is where pydantic loads."""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from copy import deepcopy
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from invdiff.card_equations import EquationCard
from invdiff.card_fields import Count, Flag, Index, NotNegative, Positive, Table
from invdiff.errors import CatalogueError, InputError


class GaussianKernel(Table):
    """A Gaussian point-spread function; std in pixels."""

    type: Literal["gaussian"]
    size: Count
    std: Positive


class MotionKernel(Table):
    """A camera-shake path; without a seed it follows the index, modulo `seeds`."""

    type: Literal["motion"]
    size: Annotated[int, Field(ge=3)]
    intensity: Annotated[float, Field(strict=True, ge=0.0, le=1.0)] = 0.5
    seed: Index | None = None
    seeds: Count = 8


class FileKernel(Table):
    """A picture of the point-spread function, normalised to sum 1."""

    type: Literal["file"]
    path: str


class RandomMask(Table):
    """Pixels observed at random; without a seed it follows the index, modulo `seeds`."""

    type: Literal["random"]
    observed: Annotated[float, Field(strict=True, gt=0.0, le=1.0)]
    seed: Index | None = None
    seeds: Count = 8


class BoxMask(Table):
    """A missing box, its side a share of the picture's shorter side, placed by a seed; in the centre with `centred`."""

    type: Literal["box"]
    side: Annotated[float, Field(strict=True, gt=0.0, lt=1.0)] = 0.5
    centred: Flag = False
    seed: Index | None = None
    seeds: Count = 8


class FileMask(Table):
    """A picture of the mask, white where observed."""

    type: Literal["file"]
    path: str


Kernel = Annotated[GaussianKernel | MotionKernel | FileKernel, Field(discriminator="type")]
Boundary = Literal["circular", "reflect", "zero", "valid"]


class BlurCard(Table):
    """Convolution."""

    type: Literal["Blur"]
    kernel: Kernel
    boundary: Boundary = "reflect"


class InpaintingCard(Table):
    """Missing pixels."""

    type: Literal["Inpainting"]
    mask: Annotated[RandomMask | BoxMask | FileMask, Field(discriminator="type")]


class DownsamplingCard(Table):
    """Anti-aliased bicubic down-sampling."""

    type: Literal["Downsampling"]
    factor: Annotated[int, Field(strict=True, ge=2)]


class CompressedSensingCard(Table):
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


class TomographyCard(Table):
    """Line integrals along parallel rays; angles is their number in half a turn, or a list of degrees."""

    type: Literal["Tomography"]
    angles: Annotated[int | tuple[float, ...], BeforeValidator(_angles)]
    detectors: Count | None = None


class HighDynamicRangeCard(Table):
    """Contrast amplified and clipped."""

    type: Literal["HighDynamicRange"]
    gain: Positive = 2.0


class NonlinearBlurCard(Table):
    """Camera shake in linear light that saturates and is gamma-encoded."""

    type: Literal["NonlinearBlur"]
    kernel: Kernel
    boundary: Boundary = "reflect"
    gamma: Annotated[float, Field(strict=True, ge=1.0, allow_inf_nan=False)] = 2.2
    exposure: Positive = 1.5
    knee: Positive = 0.1


class PhaseRetrievalCard(Table):
    """Magnitudes of the oversampled Fourier transform."""

    type: Literal["PhaseRetrieval"]
    oversampling: NotNegative = 2.0


Row = tuple[float, ...]
Matrix = tuple[Row, ...]


class DenseCard(Table):
    """A matrix on flattened inputs, a row a measured value."""

    type: Literal["Dense"]
    matrix: Matrix


class IdentityCard(Table):
    """Every value of the unknown."""

    type: Literal["Identity"]


class ParityCard(Table):
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


class GaussianNoise(Table):
    """Gaussian noise; std in the measurement's units, for pictures in [0, 1]."""

    type: Literal["gaussian"] = "gaussian"
    std: Positive


class PoissonNoise(Table):
    """Photon counts: gain is the mean count of one unit of the operator's output, background that of the dark."""

    type: Literal["poisson"]
    gain: Positive
    background: NotNegative = 1e-3


class FlipNoise(Table):
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


class ProblemData(Table):
    """Which pictures, and how large."""

    set: str
    side: Count


class ProblemCard(Table):
    """A benchmark problem."""

    name: str
    version: Index
    title: str
    description: str
    operator: OperatorCard
    noise: Noise
    data: ProblemData
    metrics: tuple[str, ...] = ("psnr_mean", "psnr_draw", "ssim_mean", "crps", "coverage_90", "spread_skill")


class MarkovChainTable(Table):
    """Markov chain of tokens, and the vector of each."""

    type: Literal["MarkovChain"]
    length: Count
    initial: Row
    transition: Matrix
    codebook: Matrix | None = None


class IsingTable(Table):
    """Ising spins on a grid (height, width), free boundaries."""

    type: Literal["Ising"]
    shape: tuple[Count, Count]
    coupling: Annotated[float, Field(strict=True, allow_inf_nan=False)]


class ProductMixtureTable(Table):
    """Mixture of laws of independent tokens, (components, length, kinds); shape is that of the unknown."""

    type: Literal["ProductMixture"]
    weights: Row
    probabilities: tuple[Matrix, ...]
    codebook: Matrix | None = None
    shape: tuple[Count, ...] | None = None


PriorTable = Annotated[MarkovChainTable | IsingTable | ProductMixtureTable, Field(discriminator="type")]


class InstanceCard(Table):
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


class DataFile(Table):
    """A file of a data set."""

    name: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    count: Count | None = None
    url: str | None = None


class DataEntry(Table):
    """A picture inside an installed package: its file, and the square (left, top, side) that is taken."""

    file: str
    box: tuple[Index, Index, Count]


class DataCard(Table):
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


_UNIONS = {"operator", "kernel", "mask", "noise", "prior", "equation"}


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
