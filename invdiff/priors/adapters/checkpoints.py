"""Published checkpoints of guided-diffusion and EDM, in the networks of deepinv, through our own parametrisations.

deepinv's own denoisers round sigma to one of 1000 steps and clamp the output (DiffUNet), or take 0.75 for the standard
deviation of data for which these checkpoints were trained with 0.5 (EDM's). Here the bare networks are called.
Nothing is downloaded, and nothing unpickled.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from invdiff.errors import InputError, ShapeError
from invdiff.priors.adapters.adapted import AdaptedPrior
from invdiff.priors.adapters.parametrisations import EDM, VarianceExploding, VariancePreserving
from invdiff.priors.adapters.schedules import NoiseSchedule
from invdiff.priors.adapters.state_dicts import fill, read_state_dict, without_prefix


def load_guided_diffusion(
    path: str | Path,
    shape: tuple[int, ...] = (3, 256, 256),
    *,
    large: bool = False,
    schedule: NoiseSchedule | None = None,
    entry: str | None = None,
    name: str | None = None,
) -> AdaptedPrior:
    """Prior from an unconditional checkpoint of guided-diffusion with learned variances (Dhariwal & Nichol 2021).

    Parameters
    ----------
    path
        A state dict, ``.safetensors``, ``.pt`` or ``.pth``: `ffhq_10m` (small) or unconditional ImageNet 256 (large).
    shape
        Shape (c, h, w) of one picture, sides divisible by 32; the checkpoints were trained at 256 x 256.
    large
        256 channels, 2 residual blocks a level and attention at 32, 16 and 8 pixels; else 128 channels, 1 block and
        attention at 16. These are deepinv's DiffUNet; other architectures need a network of your own, and
        `AdaptedPrior`.
    schedule
        Noise levels of the steps; linear, 1000 steps, if None.
    entry
        Name of the state dict within the file, where there are several.
    name
        For provenance; the file's name if None.

    Returns
    -------
        The prior in [-1, 1] with its decoder to [0, 1]; weights frozen, in float32.

    Raises
    ------
    InputError
        If the file is not a state dict of this network, or reading it would need code.
    ShapeError
        If the shape is not of pictures with sides divisible by 32.
    """
    from deepinv.models import DiffUNet

    _check_shape(shape)
    tensors = without_prefix(read_state_dict(path, entry=entry), ("module.", "model."))
    with torch.device("meta"):  # no first weights are drawn
        unet = DiffUNet(in_channels=shape[0], out_channels=shape[0], large_model=large, pretrained=None)
    for table in ("sqrt_1m_alphas_cumprod", "sqrt_alphas_cumprod"):  # of deepinv's denoiser, in no checkpoint
        delattr(unet, table)
        tensors.pop(table, None)
    fill(unet, tensors, path)
    parametrisation = VariancePreserving(schedule=schedule or NoiseSchedule.linear())
    return AdaptedPrior(_GuidedDiffusion(unet), shape, parametrisation, name=name or Path(path).stem).eval_only()


def load_edm(
    path: str | Path,
    shape: tuple[int, ...] = (3, 64, 64),
    *,
    kind: Literal["ncsnpp", "ddpmpp", "admunet"] = "ncsnpp",
    precondition: Literal["edm", "ve"] = "edm",
    sigma_data: float = 0.5,
    label: int | None = None,
    architecture: Mapping[str, Any] | None = None,
    entry: str | None = None,
    name: str | None = None,
) -> AdaptedPrior:
    """Prior from a checkpoint of EDM (Karras et al. 2022), or of a variance-exploding NCSN++ (Song et al. 2021).

    Parameters
    ----------
    path
        A state dict, ``.safetensors``, ``.pt`` or ``.pth``; with or without the prefix ``model.``. The published
        ``.pkl`` are refused: the message says how to convert them.
    shape
        Shape (c, h, w) of one picture.
    kind
        "ncsnpp" and "ddpmpp" (EDM's SongUNet, trained "-ve" and "-vp"), or "admunet" (DhariwalUNet).
    precondition
        "edm", or "ve" of the variance-exploding baseline.
    sigma_data
        Standard deviation of the data in the training, latent units; 0.5 in EDM's checkpoints. Of no use with "ve".
    label
        Class, for a conditional checkpoint; None is the vector of zeros, which stands for no class.
    architecture
        Further settings of deepinv's NCSNpp or ADMUNet where they are not the defaults: ``img_resolution`` (the
        height if missing), ``model_channels``, ``channel_mult``, ``num_blocks``, ``attn_resolutions``. For CIFAR-10
        channel_mult is (2, 2, 2). Numbers of labels and of augmentation labels are found in the file.
    entry, name
        As for `load_guided_diffusion`.

    Returns
    -------
        The prior in [-1, 1] with its decoder to [0, 1]; weights frozen, in float32.

    Raises
    ------
    InputError
        If the file is not a state dict of this network, reading it would need code, or there is no such label.
    ShapeError
        If the shape is not one of pictures.
    """
    from deepinv.models import ADMUNet, NCSNpp

    if kind not in ("ncsnpp", "ddpmpp", "admunet") or precondition not in ("edm", "ve"):
        raise InputError(
            "Need a kind 'ncsnpp', 'ddpmpp' or 'admunet' and a precondition 'edm' or 've', got "
            f"{kind!r} and {precondition!r}."
        )
    _check_shape(shape, stride=1)
    parametrisation = EDM(sigma_data=sigma_data) if precondition == "edm" else VarianceExploding()
    tensors = without_prefix(read_state_dict(path, entry=entry), ("module.", "model."))
    settings: dict[str, Any] = {"img_resolution": shape[1], **(architecture or {})}
    for side in ("label", "augment"):
        weight = tensors.get(f"map_{side}.weight")
        settings[f"{side}_dim"] = 0 if weight is None else int(weight.shape[-1])
    labels = settings["label_dim"]
    if label is not None and not 0 <= label < labels:
        raise InputError(f"There is no label {label}: {path} has {labels} of them, counted from 0.")
    model_type = {} if kind == "admunet" else {"model_type": "ncsn" if kind == "ncsnpp" else "ddpm"}
    network = ADMUNet if kind == "admunet" else NCSNpp
    with torch.device("meta"):
        unet = network(in_channels=shape[0], out_channels=shape[0], pretrained=None, **model_type, **settings)
    fill(unet, tensors, path)
    stride = 2 ** (len(settings.get("channel_mult", (1, 1, 1, 1))) - 1)
    wrapped = _Edm(unet, labels, label, stride)
    return AdaptedPrior(wrapped, shape, parametrisation, name=name or Path(path).stem).eval_only()


def _check_shape(shape: tuple[int, ...], stride: int = 32) -> None:
    if len(shape) != 3 or any(side < stride or side % stride for side in shape[1:]):
        raise ShapeError(
            f"Need pictures (channels, height, width) with sides divisible by {stride}, got {tuple(shape)}."
        )


@final
class _GuidedDiffusion(nn.Module):
    """The bare network of a DiffUNet: (x_t, fractional step) -> eps and variances."""

    stride = 32

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        out: Tensor = self.unet.forward_diffusion(x, time)
        return out


@final
class _Edm(nn.Module):
    """The bare network of EDM: (c_in z, c_noise) -> F, for one class."""

    one_hot: Tensor | None

    def __init__(self, unet: Any, labels: int, label: int | None, stride: int) -> None:
        super().__init__()
        self.unet, self.stride = unet, stride
        self.register_buffer("one_hot", torch.zeros(1, labels) if labels else None)
        if self.one_hot is not None and label is not None:
            self.one_hot[0, label] = 1.0

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        label = None if self.one_hot is None else self.one_hot.to(x.dtype).expand(len(x), -1)
        out: Tensor = self.unet.forward_unet(x, time, class_labels=label)
        return out
