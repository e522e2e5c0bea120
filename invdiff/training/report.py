"""Measure a trained prior and write its model card: report.json, samples.png, neighbours.png and README.md in its folder.

    python -m invdiff.training.report priors/photos-64 --data FOLDER

The parts are kept in report.json as they are done; a report that was cut off goes on where it stood, and parts that were made with
other weights or settings are made again.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invdiff.images import write_png
from invdiff.priors.diffusion import NetworkPrior
from invdiff.priors.loading import load_prior, read_trained_card
from invdiff.training.baselines import BASELINES, PATCH, baseline_psnr, tune
from invdiff.training.data import evaluation_pictures
from invdiff.training.export import add_noise, denoising_psnr, psnr
from invdiff.training.memorisation import nearest
from invdiff.training.model_card import model_card

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
        Unconditional draws and their noise levels; every twelfth part of them is shown beside its nearest training picture.
    calibration
        Test pictures of each data set on which the error that the denoiser's Jacobian foretells is compared with its error.
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


QUICK = ReportSettings(
    levels=(0.1, 0.2), pictures=8, subset=4, tuning=2, samples=12, steps=4, calibration=2, compared=10, searched=200
)


def _summary(values: Tensor) -> dict[str, float | int]:
    """Mean and its standard error."""
    error = float(values.std()) / len(values) ** 0.5
    return {"mean": round(float(values.mean()), 4), "standard_error": round(error, 4), "pictures": len(values)}


def grid(pictures: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Pictures (n, c, h, w), row by row, as one picture with white gaps; n must be divisible by `columns`."""
    framed = torch.nn.functional.pad(pictures.clamp(0, 1), (0, gap, 0, gap), value=1.0)
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
            yield f"subset {level}", lambda level=level: self.denoising(level, s.subset)
            yield f"classical {level}", lambda level=level: self.classical(level)
            yield f"calibration {level}", lambda level=level: self.calibration(level)
        for level in s.levels:
            yield f"denoising {level}", lambda level=level: self.denoising(level, s.pictures)

    def _each(self, values: dict[str, Tensor]) -> dict[str, Any]:
        return {name: _summary(v) for name, v in values.items()} | {"pooled": _summary(torch.cat(list(values.values())))}

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
            chosen = {"parameter": baseline.parameter, "value": round(factor * level, 6), "tried": len(baseline.factors)}
            result[name] = self._each(values) | {"settings": chosen}
        return result

    def calibration(self, level: float) -> dict[str, Any]:
        """Mean squared error of a pixel beside what the denoiser's own Jacobian says it is, sigma^2 tr(dD/dz) / d (Tweedie)."""
        s, sigma = self.settings, level / self.prior.decoder.scale
        clean = torch.cat([x[: s.calibration] for x in self.test.values()])
        device = next(self.prior.network.parameters()).device
        errors, foretold = [], []
        for start in range(0, len(clean), 10):
            x = clean[start : start + 10]
            z = self.prior.encode(add_noise(x, level, seed=s.seed + 2, first=start).to(device))
            # Hutchinson's estimate of the trace from one random sign vector a picture.
            probe = torch.where(add_noise(torch.zeros_like(x), 1.0, seed=s.seed + 3, first=start) < 0, -1.0, 1.0).to(device)
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
        shown = torch.stack((drawn[:12], ours.pictures[:12])).reshape(2, 2, 6, *drawn.shape[1:]).transpose(0, 1)
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


def environment(device: torch.device) -> dict[str, str | int]:
    """What a part ran on."""
    packages = {name: version(name) for name in ("torch", "numpy", "scikit-image", "PyWavelets")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
    return {"python": platform.python_version(), **packages, "device": name, "threads": torch.get_num_threads()}


def write_report(
    folder: Path, data: Path, out: Path, settings: ReportSettings, device: torch.device, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure what report.json does not hold yet, and write the pictures and the model card.

    Parameters
    ----------
    folder
        Of the prior, with ``train.toml`` beside its card.
    data, out
        Folder of the pictures; where to write.
    settings, device
        What to measure, and where to run the network.
    log
        Takes each line of the log.

    Returns
    -------
        The content of report.json.
    """
    from invdiff.training.settings import read_settings

    card, train = read_trained_card(folder / "prior.toml"), read_settings(folder / "train.toml")
    prior = load_prior(folder).to(device)
    identity = json.loads(
        json.dumps(
            {
                "prior": {"name": card.name, "version": card.version, "sha256": card.weights["sha256"]},
                "parameters": sum(p.numel() for p in prior.network.parameters()),
                "bytes": (folder / card.weights["file"]).stat().st_size,
                "mixture": dict(train.mixture),
                "settings": asdict(settings) | {"NL-means": PATCH},
            }
        )
    )
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.json"
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if any(report.get(k) != v for k, v in identity.items()):
        report = {**identity, "parts": {}}
    measure = Report(prior, train.mixture, data, out, settings)
    for name, work in measure.parts():
        if name not in report["parts"]:
            report["parts"][name] = {**work(), "environment": environment(device)}
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            log(f"{name} done")
    (out / "README.md").write_text(model_card(card, train, report), encoding="utf-8")
    return report


def main(arguments: list[str] | None = None) -> int:
    """Command line of a report."""
    parser = argparse.ArgumentParser(description="Measure a trained prior and write its model card.")
    parser.add_argument("prior", type=Path, help="folder of the prior, e.g. priors/photos-64")
    parser.add_argument("--data", type=Path, default=os.environ.get("INVDIFF_DATA"), help="folder of the pictures")
    parser.add_argument("--out", type=Path, help="where to write; the prior's folder if not given")
    parser.add_argument("--quick", action="store_true", help="a few pictures only, to try the report; needs --out")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    if given.data is None:
        parser.error("give the folder of the pictures with --data or INVDIFF_DATA")
    if given.quick and given.out is None:
        parser.error("--quick measures too little for a model card: give another folder than the prior's with --out")
    torch.backends.cudnn.allow_tf32 = False  # the figures are those of float32
    settings = QUICK if given.quick else ReportSettings()
    write_report(given.prior, given.data, given.out or given.prior, settings, torch.device(given.device))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
