"""Settings of a tokenizer's training."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from invdiff.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """What the training of a tokenizer is made of.

    Parameters
    ----------
    name
        Of the prior that the tokenizer belongs to.
    shape
        Shape (ch, h, w) of a picture: 1 or 3 channels, a square.
    tokenizer
        Settings of `networks.Tokenizer` besides the shape.
    mixture
        Share of each data set; see `pictures.training_pictures`.
    batch
        Pictures a step.
    learning_rate, warmup_steps
        Peak of Adam's learning rate, and the steps until it is reached; it falls to zero as a cosine of the budget
        used.
    ema_exponent
        Exponent of the power-function moving average of the weights (Karras et al. 2024, arXiv 2312.02696, eq. 1).
    absolute, squared, gradients
        Weights of the reconstruction's terms; see `reconstruction.reconstruction_loss`.
    commitment
        Weight of the term that keeps the encoder's vectors near their codes, beta of van den Oord et al. 2017.
    code_decay
        Decay of the codes' moving averages, per step.
    revive_until
        Share of the budget until which dead codes are revived.
    seconds, steps
        The budget: training time, and a bound on the steps (0: none). Whichever is used up first ends the training.
    seed
        Of weights, codes and pictures.
    log_every, validate_every
        Steps between lines of the log, and between validations.

    Raises
    ------
    InputError
        If a value is out of range.
    """

    name: str
    shape: tuple[int, ...]
    tokenizer: Mapping[str, Any]
    mixture: Mapping[str, float]
    batch: int = 256
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    ema_exponent: float = 16.97
    absolute: float = 1.0
    squared: float = 5.0
    gradients: float = 1.0
    commitment: float = 0.25
    code_decay: float = 0.99
    revive_until: float = 0.7
    seconds: float = 240.0
    steps: int = 0
    seed: int = 0
    log_every: int = 200
    validate_every: int = 4000

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or self.shape[0] not in (1, 3) or self.shape[1] != self.shape[2]:
            raise InputError(f"Pictures are grey or RGB squares: shape = [1 or 3, side, side], got {self.shape}.")
        positive = ("batch", "learning_rate", "seconds", "log_every", "validate_every")
        wrong = [f"{k} = {getattr(self, k)}" for k in positive if not getattr(self, k) > 0]
        not_negative = ("absolute", "squared", "gradients", "commitment", "steps", "warmup_steps", "ema_exponent")
        wrong += [f"{k} = {getattr(self, k)}" for k in not_negative if not getattr(self, k) >= 0]
        shares = ("code_decay", "revive_until")
        wrong += [f"{k} = {getattr(self, k)}" for k in shares if not 0 <= getattr(self, k) <= 1]
        if wrong:
            raise InputError(f"Settings out of range: {', '.join(wrong)}.")

    @property
    def identity(self) -> dict[str, object]:
        """What a resumed training must share with its beginning: all but the budget and the log."""
        free = {"seconds", "steps", "log_every", "validate_every"}
        return {k: v for k, v in asdict(self).items() if k not in free}
