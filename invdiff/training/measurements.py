"""What a report on a trained prior is made of: each part a measurement on test pictures with its own noise."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from invdiff.images import write_png
from invdiff.priors.diffusion import NetworkPrior
from invdiff.training.baselines import BASELINES, baseline_psnr, tune
from invdiff.training.data import evaluation_pictures
from invdiff.training.export import add_noise, denoising_psnr, psnr
from invdiff.training.memorisation import nearest

Part = tuple[str, Callable[[], dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What a report measures.

    Parameters
    ----------
    levels
        Noise levels, of pictures in [0, 1].
    pictures
        Test pictures of each data set at most; 0 for all.
    subset
        First test pictures of each data set that the classical denoisers see too.
    tuning
        First validation pictures of each data set on which they are tuned.
    samples, steps
        Unconditional draws, at least twelve, and their noise levels.
    calibration
        Test pictures of each data set on which the error that the denoiser's Jacobian foretells is compared with its
        error.
    compared
        Test pictures whose nearest training picture is sought.
    searched
        Training pictures of each data set that are searched; 0 for all.
    seed
        Of noise and draws.
    """

    levels: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4)
    pictures: int = 0
    subset: int = 100
    tuning: int = 8
    samples: int = 64
    steps: int = 32
    calibration: int = 50
    compared: int = 200
    searched: int = 0
    seed: int = 0


def _summary(values: Tensor) -> dict[str, float | int]:
    """Mean and its standard error."""
    error = float(values.std()) / len(values) ** 0.5
    return {"mean": round(float(values.mean()), 4), "standard_error": round(error, 4), "pictures": len(values)}


def grid(pictures: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Pictures (n, c, h, w), row by row, as one picture with white gaps; n must be divisible by `columns`."""
    framed = F.pad(pictures.clamp(0, 1), (0, gap, 0, gap), value=1.0)
    n, c, h, w = framed.shape
    return framed.reshape(n // columns, columns, c, h, w).permute(2, 0, 3, 1, 4).reshape(c, -1, columns * w)


def write_palette_png(path: Path, x: Tensor) -> None:
    """Write a picture (3, h, w) in [0, 1] as PNG of 256 dithered colours, a third of the size of true colour."""
    from PIL import Image

    picture = Image.fromarray((x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    palette = picture.quantize(256, method=Image.Quantize.MEDIANCUT)
    picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)


class Report:
    """The parts of a report on one prior.

    Parameters
    ----------
    prior
        The prior; half of its parts run on its device.
    sets
        Names of the data sets it was trained on, with their shares.
    data, out
        Folder of the pictures; folder that the two pictures are written to.
    settings
        What to measure.
    """

    def __init__(
        self, prior: NetworkPrior, sets: Mapping[str, float], data: Path, out: Path, settings: ReportSettings
    ) -> None:
        self.prior, self.sets, self.data, self.out, self.settings = prior, sets, data, out, settings
        self.side = prior.shape[1]
        self.test = {name: evaluation_pictures(name, data, "test", self.side) for name in sets}

    def parts(self) -> Iterator[Part]:
        """Name and work of each part."""
        s = self.settings
        yield "samples", self.samples
        for level in s.levels:
            yield f"subset {level}", partial(self.denoising, level, s.subset)
            yield f"classical {level}", partial(self.classical, level)
            yield f"calibration {level}", partial(self.calibration, level)
        for level in s.levels:
            yield f"denoising {level}", partial(self.denoising, level, s.pictures)

    def _each(self, values: dict[str, Tensor]) -> dict[str, Any]:
        return {name: _summary(v) for name, v in values.items()} | {
            "pooled": _summary(torch.cat(list(values.values())))
        }

    def denoising(self, level: float, count: int) -> dict[str, Any]:
        """PSNR of the prior, and of the noisy pictures, dB."""
        pictures = {name: x[: count or None] for name, x in self.test.items()}
        seed = self.settings.seed
        noisy = {name: psnr(add_noise(x, level, seed=seed), x) for name, x in pictures.items()}
        prior = {name: denoising_psnr(self.prior, x, level, seed=seed) for name, x in pictures.items()}
        return {"prior": self._each(prior), "noisy": self._each(noisy)}

    def classical(self, level: float) -> dict[str, Any]:
        """PSNR of the classical denoisers on the subset, dB."""
        s, result = self.settings, {}
        tuning = torch.cat(
            [evaluation_pictures(name, self.data, "validation", self.side)[: s.tuning] for name in self.sets]
        )
        for name, baseline in BASELINES.items():
            factor = tune(baseline, tuning, level, seed=s.seed + 1)
            values = {
                k: baseline_psnr(baseline, x[: s.subset], level, factor, seed=s.seed) for k, x in self.test.items()
            }
            chosen = {
                "parameter": baseline.parameter,
                "value": round(factor * level, 6),
                "tried": len(baseline.factors),
            }
            result[name] = self._each(values) | {"settings": chosen}
        return result

    def calibration(self, level: float) -> dict[str, Any]:
        """Mean squared error of a pixel beside what the denoiser's own Jacobian foretells, sigma^2 tr(dD/dz) / d."""
        s, sigma = self.settings, level / self.prior.decoder.scale
        clean = torch.cat([x[: s.calibration] for x in self.test.values()])
        device = next(self.prior.network.parameters()).device
        errors, foretold = [], []
        for start in range(0, len(clean), 10):
            x = clean[start : start + 10]
            z = self.prior.encode(add_noise(x, level, seed=s.seed + 2, first=start).to(device))
            # Hutchinson's estimate of the trace from one random sign vector a picture.
            probe = torch.where(add_noise(torch.zeros_like(x), 1.0, seed=s.seed + 3, first=start) < 0, -1.0, 1.0).to(
                device
            )
            estimate = self.prior.denoise(z.requires_grad_(), sigma)
            (turned,) = torch.autograd.grad(estimate, z, probe)
            errors.append((self.prior.decode(estimate.detach()).cpu() - x).square().flatten(1).mean(1))
            foretold.append(level**2 * (probe * turned).flatten(1).mean(1).cpu())
        error, own = torch.cat(errors), torch.cat(foretold)
        ratio = float(own.mean() / error.mean())
        spread = float((own - ratio * error).std() / error.mean()) / len(error) ** 0.5
        return {
            "rms_error": round(float(error.mean()) ** 0.5, 5),
            "rms_foretold": round(float(own.mean()) ** 0.5, 5),
            "variance_ratio": round(ratio, 4),
            "standard_error": round(spread, 4),
            "pictures": len(error),
        }

    def samples(self) -> dict[str, Any]:
        """Draw, show, and seek the draws among the training pictures."""
        s = self.settings
        device = next(self.prior.network.parameters()).device
        drawn = self.prior.decode(self.prior.sample(s.samples, seed=s.seed, steps=s.steps).to(device)).cpu().clamp(0, 1)
        write_palette_png(self.out / "samples.png", grid(drawn, 8 if s.samples % 8 == 0 else 6))
        ours = nearest(drawn, self.data, self.sets, count=s.searched or None)
        closest = (ours.distance / ours.second).argsort()[:12]  # the most like copies, not the first
        shown = torch.stack((drawn[closest], ours.pictures[closest])).reshape(2, 2, 6, *drawn.shape[1:]).transpose(0, 1)
        write_png(self.out / "neighbours.png", grid(shown.reshape(24, *drawn.shape[1:]), 6))
        total = sum(self.sets.values())
        test = torch.cat([self.test[name][: round(s.compared * share / total)] for name, share in self.sets.items()])
        theirs = nearest(test, self.data, self.sets, count=s.searched or None)

        def distances(distance: Tensor, second: Tensor) -> dict[str, float | int]:
            q = torch.quantile(distance, torch.tensor([0.0, 0.05, 0.5, 1.0])).tolist()
            ratio = distance / second
            return {
                "pictures": len(distance),
                **{name: round(v, 4) for name, v in zip(("least", "percentile_5", "median", "most"), q, strict=True)},
                "least_ratio": round(float(ratio.min()), 4),
                "median_ratio": round(float(ratio.median()), 4),
                "copies": int((ratio < 1 / 3).sum()),
            }

        return {
            "samples": distances(ours.distance, ours.second),
            "test": distances(theirs.distance, theirs.second),
            "evaluations_per_sample": 2 * s.steps - 1,
        }
