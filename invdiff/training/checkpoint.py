"""The state of a training on disk: safetensors and JSON alone, in pieces small enough to carry around.

Weights are kept in float32. Adam's moments, and the offset of the moving average from the weights, are kept in
bfloat16: its relative error of 2^-9 is far below the gradient's own noise, and a state of p parameters takes 10 p
bytes instead of 16 p.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from invdiff.errors import CatalogueError, InputError

_PIECE = 15 * 2**20  # bytes


@dataclass(kw_only=True)
class Progress:
    """How far a training is.

    Parameters
    ----------
    step, images
        Steps taken and pictures seen.
    elapsed
        Training time in seconds, compilation and validation not counted.
    """

    step: int = 0
    images: int = 0
    elapsed: float = 0.0


def save_state(folder: Path, tensors: Mapping[str, Tensor], progress: Progress, settings: Mapping[str, object]) -> None:
    """Write ``state-<i>.safetensors`` and, last, ``state.json``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    pieces: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in tensors.items():
        bytes_ = value.numel() * value.element_size()
        if pieces[-1] and size + bytes_ > _PIECE:
            pieces.append({})
            size = 0
        pieces[-1][name] = value.detach().cpu().contiguous()
        size += bytes_
    for i, piece in enumerate(pieces):
        save_file(piece, folder / f"state-{i}.safetensors")
    text = {"pieces": len(pieces), "progress": asdict(progress), "settings": dict(settings)}
    (folder / "state.json").write_text(json.dumps(text, indent=1), encoding="utf-8")


def load_state(folder: Path, settings: Mapping[str, object]) -> tuple[dict[str, Tensor], Progress]:
    """Read a state.

    Parameters
    ----------
    folder
        Where it is.
    settings
        What it must have been trained with.

    Raises
    ------
    CatalogueError
        If there is none.
    InputError
        If it was made with other settings.
    """
    from safetensors.torch import load_file

    path = folder / "state.json"
    if not path.is_file():
        raise CatalogueError(f"There is no training state at {path}; start without --resume.")
    text = json.loads(path.read_text(encoding="utf-8"))
    theirs, ours = text["settings"], json.loads(json.dumps(dict(settings)))
    if theirs != ours:
        raise InputError(
            f"The training state {path} was made with {theirs}, not {ours}; "
            "resume with the same settings or start anew."
        )
    tensors: dict[str, Tensor] = {}
    for i in range(text["pieces"]):
        tensors |= load_file(folder / f"state-{i}.safetensors")
    return tensors, Progress(**text["progress"])


def pack(
    weights: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """One flat dictionary of a training's tensors, at the precisions that the module's docstring gives."""
    half = torch.bfloat16
    packed = {f"weights.{k}": v for k, v in weights.items()}
    packed |= {f"average.{k}": (average[k] - v).to(half) for k, v in weights.items()}
    packed |= {f"first.{k}": v.to(half) for k, v in first.items()}
    return packed | {f"second.{k}": v.to(half) for k, v in second.items()}


def unpack(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """One part of `pack`, in float32; the average is put back on the weights."""
    found = {k.removeprefix(f"{part}."): v.float() for k, v in tensors.items() if k.startswith(f"{part}.")}
    return {k: v + tensors[f"weights.{k}"] for k, v in found.items()} if part == "average" else found
