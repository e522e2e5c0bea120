"""Priors from diffusers' unconditional and class-conditional picture models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from invdiff.errors import CapabilityError, InputError
from invdiff.priors.adapters.adapted import AdaptedPrior
from invdiff.priors.adapters.denoiser import prediction
from invdiff.priors.adapters.diffusers_folder import load_model, read_json, scheduler_file
from invdiff.priors.adapters.parametrisations import Parametrisation, RectifiedFlow, VariancePreserving
from invdiff.priors.adapters.schedules import NoiseSchedule

_FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


def from_diffusers(
    model: str | Path | nn.Module,
    scheduler: Any = None,
    *,
    shape: tuple[int, ...] | None = None,
    class_labels: int | Tensor | None = None,
    guidance: float = 0.0,
    unconditional_label: int | None = None,
    integer_steps: bool | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    name: str | None = None,
) -> AdaptedPrior:
    r"""Prior from a diffusers model: a folder on disk, or a `UNet2DModel` at hand.

    The denoiser is the network's own, at fractional time steps. Of the scheduler only the noise levels and the kind of
    prediction count; clipping, thresholds and the spacing of steps belong to its sampling.

    Parameters
    ----------
    model
        Folder of a pipeline (``unet/config.json``, ``scheduler/scheduler_config.json``) or of a model
        (``config.json``), the weights beside the config as ``diffusion_pytorch_model.safetensors``; diffusers must be
        installed. Or a module called as ``model(sample, timestep, class_labels=...)`` that returns a tensor, a tuple,
        or an object with ``sample``; it needs no diffusers, and is put into evaluation mode.
    scheduler
        A scheduler (an object with ``config``), or its config as a dict. May be None for a folder that holds one. Any
        scheduler with the betas of its training will do: DDPM, DDIM, PNDM, Euler, DPM-Solver, ...; also FlowMatchEuler.
    shape
        Shape (c, h, w) of one picture; from the config's ``in_channels`` and ``sample_size`` if None.
    class_labels
        The class: an int, or an integer tensor whose entries are all the same. The prior is that of one class, whatever
        the number of particles.
    guidance
        w of classifier-free guidance, D = D_uncond + (1 + w) (D_cond - D_uncond) (Ho & Salimans 2022): 0 is the
        conditional model itself. For w other than 0 this is the denoiser of no distribution, and the network is called
        twice.
    unconditional_label
        The label that stands for no class; needed for guidance.
    integer_steps
        Call the network at whole steps, see `VariancePreserving`. If None, only where the config says that times are
        looked up (``time_embedding_type`` "learned").
    sigma_min, sigma_max
        Noise levels in the units of [-1, 1]; those of the first and the last step if None. Cosine schedules and those
        of zero terminal signal-to-noise end above 1000, where about 160 will do.
    name
        For provenance; the folder's name or the model's class if None.

    Returns
    -------
        The prior in [-1, 1] with its decoder to [0, 1]; from a folder, with frozen weights.

    Raises
    ------
    InputError
        If a file or a field of a config is missing, the weights are a pickle or incomplete, or labels do not fit.
    CapabilityError
        If diffusers is needed and not installed, or the model is a latent or text-conditioned one, or its scheduler
        is of a kind without known noise levels.
    """
    folder = None if isinstance(model, nn.Module) else Path(model)
    if folder is not None:
        scheduler = read_json(scheduler_file(folder)) if scheduler is None else scheduler
    parametrised = _config(scheduler, "scheduler")
    network = model if isinstance(model, nn.Module) else load_model(Path(model))
    config = _config(network, "model") if shape is None or hasattr(network, "config") else {}
    embedding = config.get("time_embedding_type")
    if embedding == "fourier":
        raise CapabilityError(
            "A model with time_embedding_type 'fourier' takes noise levels, not time steps; wrap it yourself in an "
            "AdaptedPrior."
        )
    steps = embedding == "learned" if integer_steps is None else integer_steps
    label = _one_label(class_labels)
    if guidance != 0.0 and (label is None or unconditional_label is None):
        raise InputError(
            f"Classifier-free guidance of {guidance} needs class_labels and the unconditional_label, got "
            f"{class_labels!r} and {unconditional_label!r}."
        )
    stride = 2 ** max(len(config.get("down_block_types") or ()) - 1, 0)
    prior = AdaptedPrior(
        _Labelled(network, label, unconditional_label, guidance, stride),
        _shape(config) if shape is None else shape,
        _parametrisation(parametrised, integer_steps=steps),
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        name=name or (type(network).__name__ if folder is None else folder.resolve().name),
    )
    return prior if folder is None else prior.eval_only()


def _parametrisation(config: Mapping[str, Any], *, integer_steps: bool) -> Parametrisation:
    kind = config.get("_class_name", "")
    if kind in _FLOWS:
        steps = int(config.get("num_train_timesteps") or 1000)
        return RectifiedFlow(time_scale=float(steps), smallest_time=1.0 / steps)
    predicts: Any = config.get("prediction_type") or "epsilon"  # configs older than the field have it so
    if predicts not in ("epsilon", "v_prediction", "sample") or config.get("timestep_type") == "continuous":
        raise CapabilityError(
            f"The scheduler {kind or ''} predicts {predicts!r} at {config.get('timestep_type', 'discrete')} times; "
            "known are 'epsilon', 'v_prediction' and 'sample' at discrete times, and flow matching. For others see "
            "AdaptedPrior."
        )
    if kind and not {"beta_schedule", "trained_betas"} & set(config):
        raise CapabilityError(f"The scheduler {kind} has no betas; see AdaptedPrior for networks of other kinds.")
    return VariancePreserving(
        predicts=predicts, schedule=NoiseSchedule.from_diffusers(config), integer_steps=integer_steps
    )


def _config(owner: Any, what: str) -> Mapping[str, Any]:
    config = owner if isinstance(owner, Mapping) else getattr(owner, "config", None)
    if isinstance(config, Mapping):
        return config
    if config is not None and hasattr(config, "__dict__"):
        return dict(vars(config))
    raise InputError(
        f"The {what} needs a config: give an object with the attribute config"
        + (", or the config as a dict" if what == "scheduler" else ", or the shape")
        + f"; got {type(owner).__name__}."
    )


def _shape(config: Mapping[str, Any]) -> tuple[int, ...]:
    channels, side = config.get("in_channels"), config.get("sample_size")
    if channels is None or side is None:
        raise InputError(
            f"The model's config has in_channels {channels!r} and sample_size {side!r}; give shape=(c, h, w)."
        )
    sides = (side, side) if isinstance(side, int) else tuple(side)
    return (int(channels), *map(int, sides))


def _one_label(labels: int | Tensor | None) -> int | None:
    if labels is None or isinstance(labels, int):
        return labels
    values = set(labels.reshape(-1).tolist())
    if len(values) != 1 or labels.is_floating_point():
        raise InputError(
            f"A prior is of one class: give class_labels as an int, or a tensor of one integer repeated, got "
            f"{labels.dtype} with {sorted(values)[:5]}. For several classes make one prior each."
        )
    return int(values.pop())


@final
class _Labelled(nn.Module):
    """A diffusers network for one class, guided where asked: (x_t, time) -> its prediction.

    The guidance acts on predictions, which is the same as on denoisers: D is affine in the prediction, with one
    coefficient for both.
    """

    def __init__(
        self, model: nn.Module, label: int | None, unconditional: int | None, guidance: float, stride: int
    ) -> None:
        super().__init__()
        self.model, self.label, self.unconditional = model, label, unconditional
        self.guidance, self.stride = float(guidance), stride

    def _predict(self, x: Tensor, time: Tensor, label: int | None) -> Tensor:
        if label is None:
            out = self.model(x, time)
        else:
            out = self.model(x, time, class_labels=torch.full((len(x),), label, dtype=torch.long, device=x.device))
        found: Tensor = prediction(out)
        return found

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        conditional = self._predict(x, time, self.label)
        if self.guidance == 0.0:
            return conditional
        free = self._predict(x, time, self.unconditional)
        return free + (1.0 + self.guidance) * (conditional - free)
