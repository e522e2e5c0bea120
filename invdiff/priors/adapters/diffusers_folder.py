"""Folders of diffusers models, read from configs and safetensors alone."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from invdiff.errors import CapabilityError, InputError

_WEIGHTS = "diffusion_pytorch_model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; InputError if there is none."""
    if not path.is_file():
        raise InputError(f"There is no {path}; give the folder of a diffusers pipeline or model that has it.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold an object, got {type(found).__name__}.")
    return found


def scheduler_file(folder: Path) -> Path:
    """Find the scheduler's config in the folder of a model or of a pipeline."""
    beside = folder / "scheduler_config.json"
    inside = folder / "scheduler" / "scheduler_config.json"
    path = beside if beside.is_file() else inside
    if not path.is_file():
        raise InputError(f"There is no {inside}; give the scheduler, or its config as a dict, as the second argument.")
    return path


def load_model(folder: Path) -> nn.Module:
    """Build the model of a folder, from its config and safetensors alone."""
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}; get the model first, nothing is downloaded here.")
    latent = [part for part in ("vae", "vqvae", "movq", "text_encoder") if (folder / part).is_dir()]
    if latent:
        raise CapabilityError(
            f"{folder} is a latent or text-conditioned pipeline (it has {', '.join(latent)}); only models of pictures "
            "themselves can be priors here."
        )
    place = folder / "unet" if (folder / "unet").is_dir() else folder
    config = read_json(place / "config.json")
    if config.get("_class_name") != "UNet2DModel":
        raise CapabilityError(f"{place} holds a {config.get('_class_name')!r}; only 'UNet2DModel' is known.")
    if not (place / _WEIGHTS).is_file():
        pickles = sorted(p.name for p in place.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
        reason = f"; {', '.join(pickles)} is a pickle, which could run any code and is not read" if pickles else ""
        raise InputError(
            f"There is no {place / _WEIGHTS}{reason}. Get the safetensors of the model, or load it yourself and give "
            "the module."
        )
    try:
        UNet2DModel = import_module("diffusers").UNet2DModel
    except ImportError as error:
        raise CapabilityError(
            "Reading a diffusers folder needs diffusers, which is not installed: pip install diffusers. A module at "
            "hand can be given without it."
        ) from error
    try:
        with torch.random.fork_rng(devices=[]):  # first weights are drawn, and thrown away
            network, info = UNet2DModel.from_pretrained(
                place, local_files_only=True, use_safetensors=True, output_loading_info=True, low_cpu_mem_usage=False
            )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise InputError(f"diffusers cannot load {place}: {error}") from error
    faults = {
        what: sorted(map(str, info.get(what, ()))) for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if any(faults.values()):  # diffusers itself only warns, and leaves random weights
        text = "; ".join(f"{what} {', '.join(names[:5])}" for what, names in faults.items() if names)
        raise InputError(f"The weights in {place} do not fit its config: {text}.")
    found: nn.Module = network
    return found
