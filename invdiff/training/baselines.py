"""Classical denoisers of scikit-image, the one parameter of each tuned on validation pictures by noise level.

Non-local means (Buades, Coll, Morel 2005), total variation by Chambolle's dual iteration (Chambolle 2004), and
BayesShrink wavelet thresholds (Chang, Yu, Vetterli 2000). All are told the noise level; none is told what photographs
look like.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.training.export import add_noise, psnr

PATCH = {"patch_size": 5, "patch_distance": 6, "fast_mode": True}
"""Settings of non-local means: 5 x 5 patches sought within 6 pixels."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A denoiser and the values its parameter is chosen from.

    Parameters
    ----------
    name, parameter
        For the table; the parameter in words.
    factors
        What is tried; the parameter is a factor times the noise level.
    denoise
        (picture (h, w, 3) of float64 in about [0, 1], noise level, parameter) -> picture.
    """

    name: str
    parameter: str
    factors: tuple[float, ...]
    denoise: Callable[[Any, float, float], Any]


def _nl_means(picture: Any, level: float, h: float) -> Any:
    from skimage.restoration import denoise_nl_means

    return denoise_nl_means(picture, h=h, sigma=level, channel_axis=-1, **PATCH)


def _total_variation(picture: Any, level: float, weight: float) -> Any:  # noqa: ARG001 the weight holds the level
    from skimage.restoration import denoise_tv_chambolle

    tv: Callable[..., Any] = denoise_tv_chambolle
    return tv(picture, weight=weight, channel_axis=-1)


def _wavelet(picture: Any, level: float, sigma: float) -> Any:  # noqa: ARG001 its parameter is the noise level
    from skimage.restoration import denoise_wavelet

    return denoise_wavelet(picture, sigma=sigma, method="BayesShrink", mode="soft", convert2ycbcr=True, channel_axis=-1)


BASELINES: Mapping[str, Baseline] = {
    b.name: b
    for b in (
        Baseline(name="NL-means", parameter="h", factors=(0.3, 0.45, 0.6, 0.75, 0.9), denoise=_nl_means),
        Baseline(
            name="TV", parameter="weight", factors=(0.15, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0), denoise=_total_variation
        ),
        Baseline(name="wavelet", parameter="sigma", factors=(1.0,), denoise=_wavelet),
    )
}


def baseline_psnr(
    baseline: Baseline, pictures: Tensor, level: float, factor: float, *, seed: int = 0, first: int = 0
) -> Tensor:
    """PSNR of each picture (n, 3, h, w) in [0, 1], dB, shape (n,), on the noise that the prior is scored on."""
    noisy = add_noise(pictures, level, seed=seed, first=first).permute(0, 2, 3, 1).double().numpy()
    estimates = np.stack([baseline.denoise(picture, level, factor * level) for picture in noisy])
    return psnr(torch.from_numpy(estimates).permute(0, 3, 1, 2).float(), pictures)


def tune(baseline: Baseline, pictures: Tensor, level: float, *, seed: int = 1) -> float:
    """Find the factor of the highest mean PSNR on some pictures; the first of several."""
    if len(baseline.factors) == 1:
        return baseline.factors[0]
    scores = [float(baseline_psnr(baseline, pictures, level, f, seed=seed).mean()) for f in baseline.factors]
    return baseline.factors[int(np.argmax(scores))]
