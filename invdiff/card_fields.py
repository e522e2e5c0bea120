"""What cards are made of: tables that refuse unknown fields, and strict numbers."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Strict: TOML has numbers, so that text or a truth value in a number's place is a mistake.
Positive = Annotated[float, Field(strict=True, gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(strict=True, ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=1)]
Index = Annotated[int, Field(strict=True, ge=0)]
Flag = Annotated[bool, Field(strict=True)]


class Table(BaseModel):
    """A table of a card, or a card: it has these fields and no others, and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
