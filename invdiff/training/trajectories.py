r"""Train a diffusion prior of trajectories in the wavelet domain, as WDNO (Hu et al. 2025, ICLR) does.

    loss = E sum_b w_b (sigma^2 + s_b^2) / (sigma s_b)^2 |D_b(z_0 + sigma eps, sigma; what is given) - z_{0, b}|^2

over the coefficients of channels b that are not given, with s_b the channel's standard deviation and w_b = s_b / max s,
between the weights of a plain error (s_b^2) and of equal relative errors (1). For each trajectory a subset of what can
be known (initial state, target state, whole variables) is drawn and shown to the network, so that one network serves
simulation, control, inversion and unconditional draws.

The coefficients of band b are divided by 2 (rms_b rms_a)^(1/2), a the band of averages: details then stand above the
small noise levels without pretending that they weigh as much as averages.

With ``p_std = 0`` and a large ``p_mean`` the noise hides the latents, and the same network is a supervised surrogate.
With ``wavelet = "lazy"`` the bands are every other pixel, and the same network is a diffusion model of pixels.

    python -m invdiff.training.trajectories SETTINGS.toml --out FOLDER --seconds 600
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InputError
from invdiff.networks.unet import UNet
from invdiff.pde.burgers_data import BurgersSetting
from invdiff.priors.conditional import positions_of
from invdiff.priors.trajectory_loading import (
    TrajectoryCard,
    make_trajectory_prior,
    network_of,
    save_trajectory_prior,
    trajectory_decoder,
)
from invdiff.training.checkpoint import Progress
from invdiff.training.fit import Task, arguments, run
from invdiff.training.settings import read_settings_as
from invdiff.training.train import draw_sigmas
from invdiff.training.trajectories_data import trajectories

GIVEN = ("state", "forcing", "initial", "target")
"""What the network can be told, in the order of its channels."""


@dataclass(frozen=True, kw_only=True)
class TrajectorySettings:
    """What a training of trajectories is made of; as for `training.settings.Settings` where the names are the same.

    Parameters
    ----------
    name, version, description, licence
        For the card.
    shape
        Sides (time, x) of the latents' grid.
    setting
        ``named`` and ``partial`` of `BurgersSetting.named`, and fields that replace its own.
    wavelet, mode
        As for `WaveletTransform`; one level.
    laws
        Trajectories of each law of the forcing (`training.trajectories_data`).
    given
        Shares of what is known, e.g. ``{"initial+target": 0.4, "nothing": 0.1}``.
    refine
        Cells of the data's solver in a cell of the grid.
    held_out
        Trajectories of the published law for validation, of the seed after the next: the next is for benchmarks.

    Raises
    ------
    InputError
        If a value is out of range, or something unknown is given.
    """

    name: str
    version: str
    description: str
    licence: str
    shape: tuple[int, ...]
    setting: Mapping[str, Any]
    network: Mapping[str, Any]
    laws: Mapping[str, int]
    given: Mapping[str, float]
    wavelet: str = "bior2.4"
    mode: str = "periodization"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    p_mean: float = -1.0
    p_std: float = 1.6
    batch: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 500
    ema_exponent: float = 16.97
    seconds: float = 600.0
    steps: int = 0
    seed: int = 0
    refine: int = 2
    held_out: int = 20
    log_every: int = 500
    validate_every: int = 5000

    def __post_init__(self) -> None:
        positive = ("batch", "learning_rate", "seconds", "log_every", "validate_every", "refine", "held_out")
        wrong = [f"{k} = {getattr(self, k)}" for k in positive if not getattr(self, k) > 0]
        if wrong or self.steps < 0 or self.p_std < 0 or not 0 < self.sigma_min < self.sigma_max:
            raise InputError(f"Settings out of range: {', '.join(wrong) or 'steps, p_std or the noise levels'}.")
        for names in self.given:
            if names != "nothing" and not set(names.split("+")) <= set(GIVEN):
                raise InputError(f"given is made of {', '.join(GIVEN)} joined by +, or 'nothing'; got {names!r}.")
        if not self.given or min(self.given.values()) < 0 or sum(self.given.values()) <= 0:
            raise InputError(f"The shares of what is given must not be negative, nor all zero: {dict(self.given)}.")

    @property
    def identity(self) -> dict[str, object]:
        """What a resumed training must share with its beginning: all but the budget and the log."""
        free = {"seconds", "steps", "log_every", "validate_every", "description", "licence", "version"}
        return {k: v for k, v in asdict(self).items() if k not in free}

    @property
    def burgers(self) -> BurgersSetting:
        """Grid and law of the data."""
        own = dict(self.setting)
        base = asdict(BurgersSetting.named(own.pop("named", "wdno"), own.pop("partial", "none")))
        return BurgersSetting(**{**base, **own})


def measured(states: Tensor, forcing: Tensor, wavelet: str, mode: str) -> dict[str, Any]:
    """Scales of all bands, from data (n, windows + 1, points) and (n, windows, points): fields of a card's decoder."""
    from invdiff.operators.wavelet import WaveletTransform

    def bands(x: Tensor, axes: int) -> Tensor:
        W = WaveletTransform((1, *x.shape[1:]), wavelet, 1, mode, axes)  # type: ignore[arg-type]  # checked there
        return W.measure(W(x[:, None]))[0].double()

    out: dict[str, Any] = {"wavelet": wavelet, "mode": mode}
    for name, x in (("state", states), ("forcing", forcing)):
        rms = bands(x, 2)
        out[name] = [float(f"{v:.4g}") for v in 2.0 * (rms * rms[0]).clamp_min(1e-12).sqrt()]
    ends = bands(torch.cat((states[:, 0], states[:, -1])), 1)
    out["states"] = [float(f"{v:.4g}") for v in 0.5 / (ends * ends[0]).clamp_min(1e-12).sqrt()]
    return out


class TrajectoryTask:
    """Trajectories of Burgers' equation, their latents on the device, noised.

    Parameters
    ----------
    settings
        What to train.
    device
        Where the latents stay.
    kept
        Folder where data that were made are kept for the next training; none if None.
    """

    def __init__(self, settings: TrajectorySettings, device: torch.device, kept: Path | None = None) -> None:
        self.settings, self.device = settings, device
        self._held_out: tuple[Tensor, Tensor] | None = None
        setting = settings.burgers
        counts: dict[Any, int] = dict(settings.laws)
        states, forcing = trajectories(setting, counts, seed=settings.seed, refine=settings.refine, kept=kept)
        few = slice(None, None, max(1, len(states) // 2000))
        decoder = measured(states[few], forcing[few], settings.wavelet, settings.mode)
        decoder["grid"] = list(settings.shape)
        way = trajectory_decoder(setting, decoder).to(device)
        self.filled = way.filled.to(device)
        with torch.no_grad():
            parts = [
                way.inverse(torch.cat((u.flatten(1), f.flatten(1)), 1).to(device))
                for u, f in zip(torch.split(states, 1000), torch.split(forcing, 1000), strict=True)
            ]
        self.z0 = torch.cat(parts)
        self.channels = [way.channels["state"], way.channels["forcing"]]
        s = torch.stack([self.z0[:, c][:, self.filled[c]].square().mean().sqrt() for c in range(self.z0.shape[1])])
        self.sigma_data = s.clamp_min(1e-4).reshape(-1, 1, 1)
        self.weights = (self.sigma_data / self.sigma_data.max()) * self.filled
        self.card = TrajectoryCard(
            name=settings.name,
            version=settings.version,
            description=settings.description,
            licence=settings.licence,
            setting=asdict(setting),
            sigma_min=settings.sigma_min,
            sigma_max=settings.sigma_max,
            sigma_data=tuple(float(f"{v:.4g}") for v in s.tolist()),
            network=dict(settings.network),
            decoder=decoder,
        )
        prior = make_trajectory_prior(self.card).to(device)
        with torch.no_grad():
            rows = [prior.conditions["initial"](states[:, i, :].unsqueeze(1).to(device))[:, :, :1] for i in (0, -1)]
        self.ends = torch.stack(rows, 1)  # (n, 2, bands, 1, x): initial and target
        self.positions = positions_of(settings.shape).to(device)
        shares = torch.tensor(list(settings.given.values()), device=device)
        self.shares = shares / shares.sum()
        told = [[float(g in names.split("+")) for g in GIVEN] for names in settings.given]
        self.told = torch.tensor(told, device=device)

    def network(self) -> UNet:
        """Make the U-Net of the card."""
        return network_of(make_trajectory_prior(self.card))

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Noise levels, the network's input, its target, and the weights of their differences."""
        index = torch.randint(len(self.z0), (n,), generator=generator, device=self.device)
        kind = torch.multinomial(self.shares, n, replacement=True, generator=generator)
        z0, told = self.z0[index], self.told[kind][:, :, None, None, None]
        ends = self.ends[index].expand(-1, -1, -1, *self.settings.shape)
        sigma = draw_sigmas(n, self.settings, generator)
        noise = torch.randn(z0.shape, generator=generator, device=self.device)
        flags = told.expand(-1, -1, 1, *self.settings.shape)
        known = [z0[:, c] for c in self.channels] + [ends[:, 0], ends[:, 1]]
        shown = [torch.cat((k * told[:, i], flags[:, i]), 1) for i, k in enumerate(known)]
        s, s_b = sigma[:, None, None, None], self.sigma_data
        norm = (s**2 + s_b**2).sqrt()
        z = z0 + s * noise
        target = (z0 - (s_b / norm) ** 2 * z) * norm / (s * s_b)
        w = self.weights.expand(n, -1, -1, -1).clone()
        for i, c in enumerate(self.channels):
            w[:, c] *= 1.0 - told[:, i]
        whole = torch.cat((z / norm, *shown, self.positions.expand(n, -1, -1, -1)), 1)
        whole = whole.contiguous(memory_format=torch.channels_last)
        return sigma, whole, target, w / self.weights.sum()

    def losses(self, network: Callable[[Tensor, Tensor], Tensor], *drawn: Tensor) -> Tensor:
        """Weighted squared errors of the network's output."""
        sigma, whole, target, weights = drawn
        out = network(whole, sigma.log() / 4)[:, : target.shape[1]].float()
        return (weights * (out - target).square()).sum((1, 2, 3))

    @torch.no_grad()
    def validate(self, network: UNet) -> str:
        """Error of held-out simulations, each from one denoising out of noise."""
        if self._held_out is None:
            count: dict[Any, int] = {"published": self.settings.held_out}
            self._held_out = trajectories(self.settings.burgers, count, seed=self.settings.seed + 2, processes=1)
        prior = make_trajectory_prior(self.card).to(self.device)
        network_of(prior).load_state_dict(network.state_dict())
        generator = torch.Generator(device=self.device).manual_seed(self.settings.seed)
        sigma, errors = self.settings.sigma_max, []
        for u, f in zip(*(x.to(self.device) for x in self._held_out), strict=True):
            known = prior.condition({"initial": u[0], "forcing": f})
            z = sigma * torch.randn(1, *prior.shape, device=self.device, generator=generator)
            got = known.decode(known.denoise(z, sigma))[0, : u.numel()].reshape(u.shape)
            errors.append(float((got - u)[1:].square().mean()))
        mean = sum(errors) / len(errors)
        return f"validation: mean squared error of {len(errors)} trajectories in one evaluation {mean:.3e}"

    def export(self, network: UNet, progress: Progress, out: Path) -> None:
        """Write the prior."""
        training = {
            "data": [f"{count} {law}" for law, count in self.settings.laws.items()],
            "steps": progress.step,
            "examples": progress.images,
            "seconds": round(progress.elapsed, 1),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
        }
        save_trajectory_prior(out, network, replace(self.card, training=training))


def main(given: list[str] | None = None) -> int:
    """Command line of a training."""
    parser = arguments("Train a diffusion prior of trajectories.")
    parser.add_argument("--kept", type=Path, help="folder where data that were made are kept for the next training")
    options = parser.parse_args(given)
    settings = read_settings_as(
        TrajectorySettings, options.settings, seconds=options.seconds, steps=options.steps, batch=options.batch
    )
    make: Callable[[torch.device], Task] = partial(TrajectoryTask, settings, kept=options.kept)
    run(make, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
