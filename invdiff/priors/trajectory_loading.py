"""Trained priors of trajectories on disk: a card of the family "trajectory-unet", and half-precision weights.

The event is a Burgers setting's `state` and `forcing`, the latents their wavelet coefficients on one grid, and the
denoiser one U-Net that is told of what is known: whole variables, the initial state, the target (final) state.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from invdiff.errors import InputError
from invdiff.networks.unet import UNet
from invdiff.operators.band_rows import BandRows
from invdiff.operators.wavelet import WaveletTransform
from invdiff.operators.wavelet_decoder import WaveletDecoder
from invdiff.pde.burgers_data import BurgersSetting
from invdiff.priors.conditional import ConditionalPrior
from invdiff.priors.stored import check_fields, read_text, read_weights, write_prior
from invdiff.priors.wavelet import WaveletPrior

TRAJECTORY_FAMILY = "trajectory-unet"
_REQUIRED = {
    "name": str, "version": str, "family": str, "description": str, "licence": str, "dtype": str, "sigma_min": float,
    "sigma_max": float, "sigma_data": list, "setting": dict, "network": dict, "decoder": dict, "weights": dict,
}  # fmt: skip
_DECODER = ("wavelet", "mode", "grid", "state", "forcing", "states")


@dataclass(frozen=True, kw_only=True)
class TrajectoryCard:
    """What ``prior.toml`` of a trained prior of trajectories says.

    Parameters
    ----------
    name, version, description, licence
        For people.
    setting
        Settings of `BurgersSetting`: the grid and the law of the training data.
    sigma_min, sigma_max
        Noise levels, latent units.
    sigma_data
        Standard deviation of each channel of the latents.
    network
        Settings of `UNet`.
    decoder
        ``wavelet``, ``mode`` and ``grid`` of the coefficients; ``state`` and ``forcing``, the scale of each of their
        bands; ``states``, the factor of each band of an initial or target state before the network.
    training
        How it was trained.
    weights
        ``file`` and ``sha256``; filled in by `save_trajectory_prior`.
    """

    name: str
    version: str
    description: str
    licence: str
    setting: Mapping[str, Any]
    sigma_min: float
    sigma_max: float
    sigma_data: tuple[float, ...]
    network: Mapping[str, Any]
    decoder: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    family: str = TRAJECTORY_FAMILY
    dtype: str = "float32"


def read_trajectory_card(path: Path) -> TrajectoryCard:
    """Read and check a ``prior.toml``.

    Raises
    ------
    InputError
        If it is not TOML, or a field is missing, unknown or of the wrong type.
    """
    text = read_text(path)
    check_fields(path, text, TrajectoryCard, _REQUIRED, TRAJECTORY_FAMILY)
    missing = [key for key in _DECODER if key not in text["decoder"]]
    if missing:
        raise InputError(f"{path} needs {', '.join(missing)} under [decoder].")
    return TrajectoryCard(**{**text, "sigma_data": tuple(text["sigma_data"])})


def trajectory_decoder(setting: BurgersSetting, decoder: Mapping[str, Any]) -> WaveletDecoder:
    """Make the way out of a card: latents to state and forcing."""
    state, forcing = setting.event
    transforms = {
        v.name: WaveletTransform((1, *v.shape), decoder["wavelet"], 1, decoder["mode"]) for v in (state, forcing)
    }
    scales = {name: W.by_band(torch.tensor(decoder[name], dtype=torch.float64)[None]) for name, W in transforms.items()}
    return WaveletDecoder(transforms, decoder["grid"], scales=scales)


def make_trajectory_prior(card: TrajectoryCard, key: str = "") -> WaveletPrior:
    """Make the prior of a card, with weights that depend on torch's global generator, which is left as it was."""
    setting = BurgersSetting(**card.setting)
    decoder = trajectory_decoder(setting, card.decoder)
    states = {
        name: BandRows(
            (1, setting.points), card.decoder["grid"], card.decoder["wavelet"], card.decoder["mode"],
            card.decoder["states"],
        )
        for name in ("initial", "target")
    }  # fmt: skip
    channels = {n: s.stop - s.start for n, s in decoder.channels.items()}
    channels |= {name: rows.out_shape[0] for name, rows in states.items()}
    inputs = decoder.in_shape[0] + sum(channels.values()) + len(channels) + len(card.decoder["grid"])
    with torch.random.fork_rng(devices=[]):
        network = UNet(in_channels=inputs, **card.network)
    inner = ConditionalPrior(
        network,
        decoder.in_shape,
        channels,
        positions=True,
        sigma_data=torch.tensor(card.sigma_data),
        sigma_min=card.sigma_min,
        sigma_max=card.sigma_max,
        name=card.name,
        key=key,
    )
    return WaveletPrior(inner, decoder, setting.event, conditions=states)


def save_trajectory_prior(folder: Path, network: UNet, card: TrajectoryCard) -> Path:
    """Write ``prior.toml`` and ``weights.safetensors``, in float16; returns the card's path."""
    state = network.state_dict()
    return write_prior(
        folder, card, {f"network.{k}": v.detach().to("cpu", torch.float16).contiguous() for k, v in state.items()}
    )


def load_trajectory_prior(folder: Path, card: TrajectoryCard) -> WaveletPrior:
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
        prior = make_trajectory_prior(card, card.weights["sha256"])
        own = {k.removeprefix("network."): v.float() for k, v in tensors.items() if k.startswith("network.")}
        network_of(prior).load_state_dict(own)
    except (TypeError, RuntimeError) as error:
        raise InputError(f"{folder / card.weights['file']} and its card do not fit: {error}") from error
    network_of(prior).to(memory_format=torch.channels_last)
    return prior.eval().requires_grad_(requires_grad=False)


def network_of(prior: WaveletPrior) -> UNet:
    """Return the network behind a trained prior of trajectories."""
    inner = prior.prior
    assert isinstance(inner, ConditionalPrior)
    assert isinstance(inner.network, UNet)
    return inner.network
