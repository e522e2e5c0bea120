"""Settings of a training, from a TOML file; plain, so that it runs where only torch is installed."""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from invdiff.errors import InputError


@runtime_checkable
class Budget(Protocol):
    """What the learning rate of a training follows."""

    @property
    def learning_rate(self) -> float:
        """Peak of the learning rate."""
        ...

    @property
    def warmup_steps(self) -> int:
        """Steps until the peak."""
        ...

    @property
    def seconds(self) -> float:
        """Budget of time."""
        ...

    @property
    def steps(self) -> int:
        """Budget of steps, 0 for none."""
        ...


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a training is made of.

    Parameters
    ----------
    name, version, description, licence
        For the card.
    shape
        Shape (c, h, w) of a training picture.
    sigma_min, sigma_max, sigma_data
        Noise levels served and the data's standard deviation, latent units.
    p_mean, p_std
        Mean and standard deviation of ln(sigma) in training.
    batch
        Pictures a step, over all processes.
    learning_rate, warmup_steps
        Peak of Adam's learning rate, and the steps until it is reached; it falls to zero as a cosine of the budget
        used.
    ema_exponent
        Exponent of the power-function moving average (Karras et al. 2024, arXiv:2312.02696, eq. 1).
    seconds, steps
        The budget: training time, and a bound on the steps (0: none). Whichever is used up first ends the training.
    seed
        Of weights, pictures and noise.
    log_every, validate_every
        Steps between lines of the log, and between validations.
    network
        Settings of `UNet`.
    mixture
        Share of each data set.

    Raises
    ------
    InputError
        If a value is out of range.
    """

    name: str
    version: str
    description: str
    licence: str
    shape: tuple[int, ...]
    network: Mapping[str, Any]
    mixture: Mapping[str, float]
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    p_mean: float = -1.1
    p_std: float = 1.35
    batch: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 500
    ema_exponent: float = 16.97
    seconds: float = 1500.0
    steps: int = 0
    seed: int = 0
    log_every: int = 200
    validate_every: int = 2000

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or self.shape[0] != 3 or self.shape[1] != self.shape[2]:
            raise InputError(f"Training pictures are RGB squares: shape = [3, side, side], got {self.shape}.")
        positive = ("sigma_data", "p_std", "batch", "learning_rate", "seconds", "log_every", "validate_every")
        wrong = [f"{k} = {getattr(self, k)}" for k in positive if not getattr(self, k) > 0]
        if wrong or self.steps < 0 or not 0 < self.sigma_min < self.sigma_max:
            raise InputError(
                f"Settings out of range: "
                f"{', '.join(wrong) or 'steps must not be negative, and 0 < sigma_min < sigma_max'}."
            )

    @property
    def identity(self) -> dict[str, object]:
        """What a resumed training must share with its beginning: all but the budget and the log."""
        free = {"seconds", "steps", "log_every", "validate_every", "description", "licence", "version"}
        return {k: v for k, v in asdict(self).items() if k not in free}


T = TypeVar("T")


def read_settings_as(kind: Callable[..., T], path: Path, **overrides: object) -> T:
    """Read settings of a kind, a dataclass with a field ``shape``, from a TOML file; overrides as in `read_settings`.

    Raises
    ------
    InputError
        If the file is missing or no TOML, a field is missing or unknown, or a value is out of range.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8")) | {k: v for k, v in overrides.items() if v is not None}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read the training settings {path}: {error}.") from error
    unknown = set(values) - set(signature(kind).parameters)
    if unknown:
        raise InputError(f"{path} has settings that training does not know: {', '.join(sorted(unknown))}.")
    try:
        return kind(**{**values, "shape": tuple(values.get("shape", ()))})
    except TypeError as error:
        raise InputError(f"{path}: {error}.") from error


def read_settings(path: Path, **overrides: object) -> Settings:
    """Read settings from a TOML file; overrides that are not None replace its values.

    Raises
    ------
    InputError
        If the file is missing or no TOML, a field is missing or unknown, or a value is out of range.
    """
    return read_settings_as(Settings, path, **overrides)
