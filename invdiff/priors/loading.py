"""Trained priors on disk: a folder with the card ``prior.toml`` and half-precision weights whose sha256 it holds."""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import CatalogueError, ChecksumError, InputError
from invdiff.networks.unet import UNet
from invdiff.priors.diffusion import NetworkPrior
from invdiff.priors.frequency_table import FrequencyTable

FAMILY = "edm-unet"
_TABLES = ("network", "decoder", "weights", "training")
_REQUIRED = {
    "name": str, "version": str, "family": str, "description": str, "licence": str, "shape": list, "dtype": str,
    "sigma_min": float, "sigma_max": float, "sigma_data": float, "network": dict, "decoder": dict, "weights": dict,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainedCard:
    """What ``prior.toml`` of a trained prior says. Plain, so that training needs neither pydantic nor the catalogue.

    Parameters
    ----------
    name, version, description, licence
        For people.
    shape
        Shape (c, h, w) the network was trained at.
    sigma_min, sigma_max, sigma_data
        Noise levels and the data's standard deviation, latent units.
    network
        Settings of `UNet`.
    decoder
        ``scale`` and ``offset`` from latents to pictures.
    training
        How it was trained: data, steps, images, device, seconds, versions.
    weights
        ``file`` and ``sha256``; filled in by `save_prior`.
    """

    name: str
    version: str
    description: str
    licence: str
    shape: tuple[int, ...]
    sigma_min: float
    sigma_max: float
    sigma_data: float
    network: Mapping[str, Any]
    decoder: Mapping[str, float] = field(default_factory=lambda: {"scale": 0.5, "offset": 0.5})
    training: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    family: str = FAMILY
    dtype: str = "float32"


def read_trained_card(path: Path) -> TrainedCard:
    """Read and check a ``prior.toml``.

    Raises
    ------
    InputError
        If it is not TOML, or a field is missing, unknown or of the wrong type.
    """
    try:
        text = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a TOML file: {error}.") from error
    for key, kind in _REQUIRED.items():
        if not isinstance(text.get(key), (int, float) if kind is float else kind):
            raise InputError(f"{path} needs the field {key!r} of type {kind.__name__}, got {text.get(key)!r}.")
    unknown = set(text) - set(TrainedCard.__dataclass_fields__)
    if unknown:
        raise InputError(f"{path} has fields that no trained prior has: {', '.join(sorted(unknown))}.")
    if text["family"] != FAMILY or text["dtype"] != "float32":
        raise InputError(
            f"{path} is of family {text['family']!r}, dtype {text['dtype']!r}; "
            f"only {FAMILY!r} in 'float32' can be loaded."
        )
    if not {"file", "sha256"} <= set(text["weights"]):
        raise InputError(f"{path} needs 'file' and 'sha256' under [weights].")
    return TrainedCard(**{**text, "shape": tuple(text["shape"])})


def _toml(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)  # TOML shares JSON's strings, numbers and booleans


def card_text(card: TrainedCard) -> str:
    """Write a card as TOML."""
    fields = asdict(card)
    lines = [f"{k} = {_toml(v)}" for k, v in fields.items() if k not in _TABLES]
    for table in _TABLES:
        lines += ["", f"[{table}]", *(f"{k} = {_toml(v)}" for k, v in fields[table].items())]
    return "\n".join(lines) + "\n"


def save_prior(folder: Path, prior: NetworkPrior, card: TrainedCard) -> Path:
    """Write ``prior.toml`` and ``weights.safetensors`` (float16 weights, float32 curvature) into a folder.

    Returns
    -------
        The card's path.
    """
    from safetensors.torch import save

    tensors = {
        f"network.{k}": v.detach().to("cpu", torch.float16).contiguous() for k, v in prior.network.state_dict().items()
    }
    if prior.curvature is not None:
        tensors |= prior.curvature.tensors()
    blob = save(tensors, metadata={"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.safetensors").write_bytes(blob)
    weights = {"file": "weights.safetensors", "sha256": hashlib.sha256(blob).hexdigest()}
    path = folder / "prior.toml"
    path.write_text(card_text(TrainedCard(**{**vars(card), "weights": weights})), encoding="utf-8")
    return path


def read_weights(card: TrainedCard, folder: Path) -> dict[str, Tensor]:
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


def _folder(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.name == "prior.toml" and path.is_file():
        return path.parent
    if (path / "prior.toml").is_file():
        return path
    if path.is_dir() or len(path.parts) > 1:
        raise CatalogueError(
            f"There is no prior at {path}: it needs a file prior.toml; see invdiff.training for how one is made."
        )
    from invdiff import cards

    found: Path = cards.find("priors", str(name_or_path))
    return found if found.is_dir() else found.parent


def load_prior(name_or_path: str | Path) -> NetworkPrior:
    """Load a trained prior by its name in the catalogue, or from its folder or card.

    The weights are stored in half precision and computed with in the card's dtype; they are frozen.

    Raises
    ------
    CatalogueError
        If there is no such prior, or its weights are missing.
    ChecksumError
        If the weights are not what the card promises.
    InputError
        If the card is wrong, or the weights do not fit its network.
    """
    folder = _folder(name_or_path)
    card = read_trained_card(folder / "prior.toml")
    tensors = read_weights(card, folder)
    try:
        with torch.random.fork_rng(devices=[]):  # first weights are drawn, and thrown away
            network = UNet(in_channels=card.shape[0], **card.network)
        network.load_state_dict(
            {k.removeprefix("network."): v.float() for k, v in tensors.items() if k.startswith("network.")}
        )
        network.to(memory_format=torch.channels_last)  # convolutions are a tenth faster so, on processors too
    except (TypeError, RuntimeError) as error:
        raise InputError(
            f"{folder / card.weights['file']} and the [network] of its card do not fit: {error}"
        ) from error
    table = None
    if "curvature.sigmas" in tensors:
        table = FrequencyTable(card.shape, tensors["curvature.sigmas"], tensors["curvature.log_variance"])
    return NetworkPrior(
        network,
        card.shape,
        sigma_data=card.sigma_data,
        sigma_min=card.sigma_min,
        sigma_max=card.sigma_max,
        scale=card.decoder["scale"],
        offset=card.decoder["offset"],
        curvature=table,
        name=card.name,
        key=card.weights["sha256"],
    ).eval_only()
