"""Trained priors on disk, whatever their family: the card ``prior.toml``, and the weights whose sha256 it holds."""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from invdiff.errors import CatalogueError, ChecksumError, InputError

_TABLES = ("setting", "network", "refiner", "tokenizer", "decoder", "weights", "training")


@runtime_checkable
class Card(Protocol):
    """What the cards of all families have; they are dataclasses."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """The prior's name."""
        ...

    @property
    def weights(self) -> Mapping[str, str]:
        """``file`` and ``sha256``."""
        ...


def read_text(path: Path) -> dict[str, Any]:
    """Read a ``prior.toml``.

    Raises
    ------
    InputError
        If it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a TOML file: {error}.") from error


def check_fields(path: Path, text: Mapping[str, Any], card: type, required: Mapping[str, type], family: str) -> None:
    """Raise InputError unless a card's text has the fields that its family needs, and no others."""
    for key, kind in required.items():
        if not isinstance(text.get(key), (int, float) if kind is float else kind):
            raise InputError(f"{path} needs the field {key!r} of type {kind.__name__}, got {text.get(key)!r}.")
    unknown = set(text) - set(card.__dataclass_fields__)  # type: ignore[attr-defined]
    if unknown:
        raise InputError(f"{path} has fields that no trained prior has: {', '.join(sorted(unknown))}.")
    if text["family"] != family or text["dtype"] != "float32":
        raise InputError(
            f"{path} is of family {text['family']!r}, dtype {text['dtype']!r}; "
            f"only {family!r} in 'float32' can be loaded."
        )
    if not {"file", "sha256"} <= set(text["weights"]):
        raise InputError(f"{path} needs 'file' and 'sha256' under [weights].")


def _toml(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)  # TOML shares JSON's strings, numbers and booleans


def card_text(card: Card) -> str:
    """Write a card as TOML."""
    fields = asdict(card)
    lines = [f"{k} = {_toml(v)}" for k, v in fields.items() if k not in _TABLES]
    for table in (t for t in _TABLES if t in fields):
        lines += ["", f"[{table}]", *(f"{k} = {_toml(v)}" for k, v in fields[table].items())]
    return "\n".join(lines) + "\n"


def write_prior(folder: Path, card: Card, tensors: Mapping[str, Tensor]) -> Path:
    """Write ``weights.safetensors``, and ``prior.toml`` with its sha256; returns the card's path."""
    from safetensors.torch import save

    blob = save(dict(tensors), metadata={"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.safetensors").write_bytes(blob)
    weights = {"file": "weights.safetensors", "sha256": hashlib.sha256(blob).hexdigest()}
    path = folder / "prior.toml"
    path.write_text(card_text(replace(card, weights=weights)), encoding="utf-8")
    return path


def read_weights(card: Card, folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a card, checked against its sha256.

    Raises
    ------
    CatalogueError
        If the file is missing.
    ChecksumError
        If it is not what the card promises.
    """
    from safetensors.torch import load

    path = folder / card.weights["file"]
    if not path.is_file():
        raise CatalogueError(
            f"The weights {path} of the prior {card.name!r} are missing; get them again or train the prior."
        )
    blob = path.read_bytes()
    digest = hashlib.sha256(blob).hexdigest()
    if digest != card.weights["sha256"]:
        raise ChecksumError(
            f"{path} ({len(blob)} bytes) is corrupt, truncated or replaced: sha256 {digest}, the card says "
            f"{card.weights['sha256']}; get the file again."
        )
    tensors: dict[str, Tensor] = load(blob)
    return tensors
