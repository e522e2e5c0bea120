"""Priors by name: trained ones on disk, and the exact ones of problems that bring their own.

A trained prior is a folder with the card ``prior.toml`` and half-precision weights whose sha256 the card holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from invdiff.errors import CatalogueError, InputError
from invdiff.networks.unet import UNet
from invdiff.priors.diffusion import NetworkPrior
from invdiff.priors.frequency_table import FrequencyTable
from invdiff.priors.masked import ExactMaskedPrior
from invdiff.priors.masked_loading import MASKED_FAMILY, MaskedCard, load_masked_prior, read_masked_card
from invdiff.priors.masked_network import MaskedNetworkPrior
from invdiff.priors.stored import check_fields, read_text, read_weights, write_prior
from invdiff.priors.trajectory_loading import (
    TRAJECTORY_FAMILY,
    TrajectoryCard,
    load_trajectory_prior,
    read_trajectory_card,
)
from invdiff.priors.wavelet import WaveletPrior

FAMILY = "edm-unet"
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
    text = read_text(path)
    check_fields(path, text, TrainedCard, _REQUIRED, FAMILY)
    return TrainedCard(**{**text, "shape": tuple(text["shape"])})


def save_prior(folder: Path, prior: NetworkPrior, card: TrainedCard) -> Path:
    """Write ``prior.toml`` and ``weights.safetensors`` (float16 weights, float32 curvature) into a folder.

    Returns
    -------
        The card's path.
    """
    tensors = {
        f"network.{k}": v.detach().to("cpu", torch.float16).contiguous() for k, v in prior.network.state_dict().items()
    }
    if prior.curvature is not None:
        tensors |= prior.curvature.tensors()
    return write_prior(folder, card, tensors)


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


def load_prior(name_or_path: str | Path) -> NetworkPrior | MaskedNetworkPrior | ExactMaskedPrior | WaveletPrior:
    """Load a prior by its name in the catalogue, or from its folder or card.

    The weights of a trained one are stored in half precision and computed with in the card's dtype; they are frozen.

    Parameters
    ----------
    name_or_path
        A trained prior; or a problem that brings its own, as ``"chain-8"`` does.

    Returns
    -------
        A diffusion prior; for a card of the family "masked-transformer" a masked one, of "trajectory-unet" one of
        trajectories' wavelet coefficients; for a problem's name its exact masked prior.

    Raises
    ------
    CatalogueError
        If there is no such prior, or its weights are missing.
    ChecksumError
        If the weights are not what the card promises.
    InputError
        If the card is wrong, or the weights do not fit its network.
    """
    own = _of_a_problem(name_or_path)
    if own is not None:
        return own
    folder = _folder(name_or_path)
    card = read_card(folder / "prior.toml")
    if isinstance(card, TrajectoryCard):
        return load_trajectory_prior(folder, card)
    return load_masked_prior(folder, card) if isinstance(card, MaskedCard) else load_network_prior(folder, card)


def _of_a_problem(name_or_path: str | Path) -> ExactMaskedPrior | None:
    """Make the prior of a problem's card that has one; None if the name or path is of something else."""
    from invdiff import cards

    path = Path(name_or_path)
    known = str(name_or_path) not in cards.names("priors") and str(name_or_path) in cards.names("problems")
    if not known and not (path.suffix == ".toml" and path.name != "prior.toml" and path.is_file()):
        return None
    from invdiff.card_models import InstanceCard
    from invdiff.card_models import read_card as read_problem
    from invdiff.priors.from_card import prior_from_card

    card = read_problem(cards.find("problems", name_or_path), "problems")
    if not isinstance(card, InstanceCard):
        raise CatalogueError(
            f"{name_or_path} is a problem without a prior of its own; take a trained one: "
            f"{', '.join(cards.names('priors'))}."
        )
    return prior_from_card(card.prior)


def read_card(path: Path) -> TrainedCard | MaskedCard | TrajectoryCard:
    """Read and check a ``prior.toml`` of any family.

    Raises
    ------
    InputError
        If it is not TOML, or a field is missing, unknown or of the wrong type.
    """
    family = read_text(path).get("family")
    if family == TRAJECTORY_FAMILY:
        return read_trajectory_card(path)
    return read_masked_card(path) if family == MASKED_FAMILY else read_trained_card(path)


def load_network_prior(folder: Path, card: TrainedCard) -> NetworkPrior:
    """Load the diffusion prior of a card and its folder; raises as `load_prior` does."""
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
