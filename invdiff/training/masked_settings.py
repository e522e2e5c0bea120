"""Settings of a masked transformer's training."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from invdiff.errors import InputError


@dataclass(frozen=True, kw_only=True)
class MaskedSettings:
    """What the training of a masked prior is made of.

    Parameters
    ----------
    name, version, description, licence
        For the card.
    shape
        Shape (ch, h, w) of a picture, or (length,) of a sequence of symbols.
    alphabet
        Symbols of a sequence; empty for pictures.
    network
        Settings of `MaskedTransformer` besides the axes and the vocabulary, which are the data's.
    mixture
        Share of each data set; of sequences, the one that there is.
    batch
        Sequences a step.
    learning_rate, warmup_steps
        Peak of AdamW's learning rate, and the steps until it is reached; it falls to zero as a cosine of the budget
        used.
    weight_decay
        AdamW's, on matrices alone.
    ema_exponent
        Exponent of the power-function moving average of the weights (Karras et al. 2024, arXiv 2312.02696, eq. 1).
    seconds, steps
        The budget: training time, and a bound on the steps (0: none). Whichever is used up first ends the training.
    seed
        Of weights, sequences and masks.
    log_every, validate_every
        Steps between lines of the log, and between validations. The averaged weights of the best validation are kept.

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
    alphabet: str = ""
    batch: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    weight_decay: float = 0.05
    ema_exponent: float = 16.97
    seconds: float = 300.0
    steps: int = 0
    seed: int = 0
    log_every: int = 500
    validate_every: int = 1000

    def __post_init__(self) -> None:
        if len(self.shape) not in (1, 3) or (len(self.shape) == 1) != bool(self.alphabet):
            raise InputError(
                "Give the shape [ch, h, w] of pictures, or [length] and an alphabet; got "
                f"{list(self.shape)} and {self.alphabet!r}."
            )
        positive = ("batch", "learning_rate", "seconds", "log_every", "validate_every")
        wrong = [f"{k} = {getattr(self, k)}" for k in positive if not getattr(self, k) > 0]
        not_negative = ("steps", "warmup_steps", "ema_exponent", "weight_decay")
        wrong += [f"{k} = {getattr(self, k)}" for k in not_negative if not getattr(self, k) >= 0]
        if wrong:
            raise InputError(f"Settings out of range: {', '.join(wrong)}.")

    @property
    def identity(self) -> dict[str, object]:
        """What a resumed training must share with its beginning: all but the budget and the log."""
        free = {"seconds", "steps", "log_every", "validate_every", "description", "licence", "version"}
        return {k: v for k, v in asdict(self).items() if k not in free}
