r"""Train a diffusion prior of pictures, by EDM's denoising loss.

    loss = E_{sigma, z_0, eps} (sigma^2 + s^2) / (sigma s)^2 |D(z_0 + sigma eps, sigma) - z_0|^2,   ln(sigma) ~
    N(p_mean, p_std^2)

(Karras et al. 2022, arXiv:2206.00364, eq. 8 and table 1). The noise levels of a batch are stratified, which lowers
the loss's variance. Budget, state and several processes are `training.fit`'s.

    python -m invdiff.training.train SETTINGS.toml --data FOLDER --out FOLDER --seconds 1500 --limit 540 --resume
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from invdiff.networks.unet import UNet
from invdiff.training.checkpoint import Progress
from invdiff.training.data import Mixture
from invdiff.training.export import export, validate
from invdiff.training.fit import arguments, fit, run
from invdiff.training.settings import Settings, read_settings


@runtime_checkable
class NoiseLevels(Protocol):
    """Settings of a training's noise levels."""

    @property
    def p_mean(self) -> float:
        """Mean of ln(sigma)."""
        ...

    @property
    def p_std(self) -> float:
        """Standard deviation of ln(sigma)."""
        ...

    @property
    def sigma_min(self) -> float:
        """Smallest noise level."""
        ...

    @property
    def sigma_max(self) -> float:
        """Largest noise level."""
        ...


def draw_sigmas(n: int, settings: NoiseLevels, generator: torch.Generator) -> Tensor:
    """Noise levels (n,), log-normal, one from each n-th of the distribution, in random order."""
    device = generator.device
    u = (torch.randperm(n, generator=generator, device=device) + torch.rand(n, generator=generator, device=device)) / n
    normal = math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 1e-6, 1 - 1e-6))
    return (settings.p_mean + settings.p_std * normal).exp().clamp(settings.sigma_min, settings.sigma_max)


def denoising_loss(
    network: Callable[[Tensor, Tensor], Tensor], z0: Tensor, sigma: Tensor, noise: Tensor, sigma_data: float
) -> Tensor:
    """EDM's weighted loss of each picture (n,): the network's own mean squared error on a target of unit variance."""
    s = sigma[:, None, None, None]
    norm = (s**2 + sigma_data**2).sqrt()
    z = z0 + s * noise
    target = (z0 - (sigma_data / norm) ** 2 * z) * norm / (s * sigma_data)
    return (network(z / norm, sigma.log() / 4).float() - target).square().mean((1, 2, 3))


class PictureTask:
    """Pictures of several data sets, noised.

    Parameters
    ----------
    settings
        What to train.
    data
        Folder of the training pictures.
    device
        Where they stay.
    """

    def __init__(self, settings: Settings, data: Path, device: torch.device) -> None:
        self.settings, self.data, self.device = settings, data, device
        self.mixture = Mixture(data, settings.mixture, settings.shape[1], device)

    def network(self) -> UNet:
        """Make a U-Net of the pictures' channels."""
        return UNet(in_channels=self.settings.shape[0], **self.settings.network)

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Noise levels, pictures and noise."""
        z0 = self.mixture.batch(n, generator)
        sigma = draw_sigmas(n, self.settings, generator)
        noise = torch.randn(z0.shape, generator=generator, device=self.device)
        if self.device.type == "cuda":
            z0, noise = z0.to(memory_format=torch.channels_last), noise.to(memory_format=torch.channels_last)
        return sigma, z0, noise

    def losses(self, network: Callable[[Tensor, Tensor], Tensor], *drawn: Tensor) -> Tensor:
        """Losses of the pictures."""
        sigma, z0, noise = drawn
        return denoising_loss(network, z0, sigma, noise, self.settings.sigma_data)

    def validate(self, network: UNet) -> str:
        """Denoising of validation pictures."""
        return validate(network, self.settings, self.data, self.device)

    def export(self, network: UNet, progress: Progress, out: Path) -> None:
        """Measure the curvature and write the prior."""
        export(network, self.settings, progress, self.data, out, self.device)


def train(
    settings: Settings,
    data: Path,
    out: Path,
    device: torch.device,
    *,
    resume: bool = False,
    limit: float = math.inf,
    compiled: bool = False,
    log: Callable[[str], None] = print,
) -> bool:
    """Train on the pictures in a folder; the other arguments and the result are those of `training.fit.fit`."""
    task = PictureTask(settings, data, device)
    return fit(task, out, device, resume=resume, limit=limit, compiled=compiled, log=log)


def main(given: list[str] | None = None) -> int:
    """Command line of a training."""
    parser = arguments("Train a diffusion prior of pictures.")
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("INVDIFF_DATA"), help="folder of the pictures (or INVDIFF_DATA)"
    )
    options = parser.parse_args(given)
    if options.data is None:
        parser.error("give the folder of the pictures with --data or INVDIFF_DATA")
    settings = read_settings(options.settings, seconds=options.seconds, steps=options.steps, batch=options.batch)
    run(lambda device: PictureTask(settings, options.data, device), options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
