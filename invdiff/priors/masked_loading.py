"""Trained masked priors on disk: a card of the family "masked-transformer", and half-precision weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from invdiff.errors import InputError
from invdiff.networks.masked_transformer import MaskedTransformer
from invdiff.networks.tokenizer import Tokenizer
from invdiff.priors.masked_network import MaskedNetworkPrior
from invdiff.priors.stored import check_fields, read_text, read_weights, write_prior

MASKED_FAMILY = "masked-transformer"
_REQUIRED = {
    "name": str, "version": str, "family": str, "description": str, "licence": str, "dtype": str,
    "network": dict, "tokenizer": dict, "weights": dict,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MaskedCard:
    """What ``prior.toml`` of a trained masked prior says.

    Parameters
    ----------
    name, version, description, licence
        For people.
    network
        Settings of `MaskedTransformer`.
    tokenizer
        Settings of `Tokenizer`; empty for sequences of symbols.
    alphabet
        Their symbols, one character each.
    training
        How it was trained: data, steps, sequences, device, seconds, versions.
    weights
        ``file`` and ``sha256``; filled in by `save_masked_prior`.
    """

    name: str
    version: str
    description: str
    licence: str
    network: Mapping[str, Any]
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    alphabet: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    family: str = MASKED_FAMILY
    dtype: str = "float32"


def read_masked_card(path: Path) -> MaskedCard:
    """Read and check a ``prior.toml``.

    Raises
    ------
    InputError
        If it is not TOML, or a field is missing, unknown or of the wrong type.
    """
    text = read_text(path)
    check_fields(path, text, MaskedCard, _REQUIRED, MASKED_FAMILY)
    return MaskedCard(**text)


def make_masked_prior(card: MaskedCard, key: str = "") -> MaskedNetworkPrior:
    """Make the prior of a card, with weights that depend on torch's global generator, which is left as it was."""
    with torch.random.fork_rng(devices=[]):
        network = MaskedTransformer(**card.network)
        tokenizer = Tokenizer(**card.tokenizer) if card.tokenizer else None
    return MaskedNetworkPrior(network, tokenizer, alphabet=card.alphabet, name=card.name, key=key)


def save_masked_prior(folder: Path, prior: MaskedNetworkPrior, card: MaskedCard) -> Path:
    """Write ``prior.toml`` and ``weights.safetensors``, in float16; returns the card's path."""
    state = {k: v for k, v in prior.state_dict().items() if k.startswith(("network.", "tokenizer."))}
    return write_prior(folder, card, {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in state.items()})


def load_masked_prior(folder: Path, card: MaskedCard) -> MaskedNetworkPrior:
    """Load the prior of a card and its folder, frozen, in float32.

    Raises
    ------
    CatalogueError
        If the weights are missing.
    ChecksumError
        If they are not what the card promises.
    InputError
        If they do not fit the card.
    """
    tensors = read_weights(card, folder)
    try:
        prior = make_masked_prior(card, card.weights["sha256"])
        for part, module in (("network.", prior.network), ("tokenizer.", prior.tokenizer)):
            if module is not None:
                own = {k.removeprefix(part): v.float() for k, v in tensors.items() if k.startswith(part)}
                module.load_state_dict(own)
    except (TypeError, RuntimeError) as error:
        raise InputError(f"{folder / card.weights['file']} and its card do not fit: {error}") from error
    return prior.eval_only()
