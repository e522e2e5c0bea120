"""The end of a training: validation, the measured curvature, and the prior's files."""

from pathlib import Path

import torch
from torch import Tensor

from invdiff.networks.unet import UNet
from invdiff.priors.diffusion import NetworkPrior
from invdiff.priors.frequency_table import FrequencyTable
from invdiff.priors.loading import TrainedCard, save_prior
from invdiff.training.checkpoint import Progress
from invdiff.training.data import evaluation_pictures
from invdiff.training.settings import Settings

LEVELS = (0.05, 0.1, 0.2)
"""Noise levels of the validation, of pictures in [0, 1]."""


def psnr(estimate: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, shape (n,), the estimate clipped to [0, 1]."""
    error = (estimate.clamp(0, 1) - truth).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp_min(1e-12))


def add_noise(pictures: Tensor, level: float, *, seed: int = 0, first: int = 0) -> Tensor:
    """Add white noise of a level in [0, 1] to pictures (n, c, h, w) numbered from `first`, each with its own stream."""
    noise = torch.empty_like(pictures)
    for i in range(len(pictures)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + first + i)
        noise[i] = torch.randn(pictures.shape[1:], generator=generator)
    return pictures + level * noise


@torch.no_grad()
def denoising_psnr(
    prior: NetworkPrior, pictures: Tensor, level: float, *, seed: int = 0, first: int = 0, batch: int = 100
) -> Tensor:
    """PSNR of each picture in [0, 1] after `add_noise` and the denoiser, dB, shape (n,); the same for any batch."""
    values = []
    device = next(prior.network.parameters()).device
    for start in range(0, len(pictures), batch):
        clean = pictures[start : start + batch]
        noisy = add_noise(clean, level, seed=seed, first=first + start)
        estimate = prior.decode(prior.denoise(prior.encode(noisy.to(device)), level / prior.decoder.scale))
        values.append(psnr(estimate.cpu(), clean))
    return torch.cat(values)


def wrap(network: UNet, settings: Settings) -> NetworkPrior:
    """Make the prior of a network in training."""
    return NetworkPrior(
        network,
        settings.shape,
        sigma_data=settings.sigma_data,
        sigma_min=settings.sigma_min,
        sigma_max=settings.sigma_max,
        name=settings.name,
    )


def validate(network: UNet, settings: Settings, data: Path, device: torch.device, count: int = 100) -> str:
    """Give a line with the denoising PSNR on the first validation pictures of each data set."""
    prior, parts = wrap(network, settings).to(device), []
    for name in settings.mixture:
        pictures = evaluation_pictures(name, data, "validation", settings.shape[1])[:count]
        means = " ".join(f"{float(denoising_psnr(prior, pictures, level).mean()):.2f}" for level in LEVELS)
        parts.append(f"{name} {means}")
    return f"validation PSNR (dB) at noise {LEVELS}: {'; '.join(parts)}"


def measure_curvature(
    prior: NetworkPrior, settings: Settings, data: Path, device: torch.device, *, count: int = 400, levels: int = 24
) -> FrequencyTable:
    """Measure the frequency table of a prior on validation pictures, each data set by its share of `count`."""
    total = sum(settings.mixture.values())
    pictures = torch.cat(
        [
            evaluation_pictures(name, data, "validation", settings.shape[1])[: max(1, round(count * share / total))]
            for name, share in settings.mixture.items()
        ]
    )
    sigmas = torch.logspace(
        torch.tensor(settings.sigma_min).log10().item(),
        torch.tensor(settings.sigma_max).log10().item(),
        levels,
        dtype=torch.float64,
    )
    generator = torch.Generator(device=device).manual_seed(settings.seed)
    batches = (prior.encode(batch.to(device)) for batch in torch.split(pictures, 100))
    return FrequencyTable.measure(prior.denoise, batches, sigmas, generator=generator)


def export(
    network: UNet,
    settings: Settings,
    progress: Progress,
    data: Path,
    out: Path,
    device: torch.device,
    *,
    count: int = 400,
) -> Path:
    """Measure the curvature and write ``prior.toml`` and ``weights.safetensors``; returns the card's path."""
    prior = wrap(network, settings).to(device)
    prior.curvature = measure_curvature(prior, settings, data, device, count=count)
    card = TrainedCard(
        name=settings.name,
        version=settings.version,
        description=settings.description,
        licence=settings.licence,
        shape=settings.shape,
        sigma_min=settings.sigma_min,
        sigma_max=settings.sigma_max,
        sigma_data=settings.sigma_data,
        network=dict(settings.network),
        training={
            "data": list(settings.mixture),
            "steps": progress.step,
            "images": progress.images,
            "seconds": round(progress.elapsed, 1),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
        },
    )
    return save_prior(out, prior, card)
