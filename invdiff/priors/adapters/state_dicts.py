"""Weights from files that hold nothing but tensors: nothing is ever executed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invdiff.errors import InputError

_SHOWN = 5


def read_state_dict(path: str | Path, *, entry: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a file ``.safetensors``, ``.pt`` or ``.pth``.

    A pickle can run any code when it is read. So ``.pt`` and ``.pth`` are read by torch's restricted reader, which
    knows tensors and plain containers only, and everything else is refused.

    Parameters
    ----------
    path
        The file.
    entry
        Name of the state dict within the file, where there are several (e.g. "ema").

    Returns
    -------
        Tensors by name, on the CPU.

    Raises
    ------
    InputError
        If there is no such file, it is of another kind, needs code to be read, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}; give the path of a .safetensors, .pt or .pth file.")
    content: Any
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            content = load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path} is not a safetensors file: {error}.") from error
    elif path.suffix in (".pt", ".pth"):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a hostile or broken file makes it raise
            raise InputError(f"{path} cannot be read as tensors alone. {_CONVERT}") from error
    else:
        raise InputError(f"{path} is of the kind {path.suffix or 'without a suffix'!r}, which is not read. {_CONVERT}")
    if entry is not None:
        if not isinstance(content, Mapping) or entry not in content:
            known = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
            raise InputError(f"{path} has no entry {entry!r}; it holds {_short(known)}.")
        content = content[entry]
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        known = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise InputError(f"{path} is not a state dict of tensors; it holds {_short(known)}. Name one with entry=.")
    if not content:
        raise InputError(f"{path} holds no tensors.")
    return {str(name): tensor for name, tensor in content.items()}


_CONVERT = (
    "Reading a pickle runs the code in it, so it is refused. If you trust its origin, open it once in the program it "
    "comes from and write the weights alone: safetensors.torch.save_file(network.state_dict(), 'weights.safetensors') "
    "(for an EDM pickle the network is the entry 'ema', and its .model what is wanted here)."
)


def without_prefix(tensors: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Take off each prefix that all names share, in turn (``module.`` of a parallel wrapper, ``model.`` of EDM's)."""
    found = dict(tensors)
    for prefix in prefixes:
        if found and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def fill(network: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Give a network built on the meta device its weights, in float32.

    Raises
    ------
    InputError
        If a tensor is missing, superfluous or of the wrong shape; the message names some.
    """
    needed = network.state_dict()
    missing, extra = sorted(set(needed) - set(tensors)), sorted(set(tensors) - set(needed))
    wrong = [
        f"{name} ({tuple(tensors[name].shape)} for {tuple(t.shape)})"
        for name, t in needed.items()
        if name in tensors and tensors[name].shape != t.shape
    ]
    faults = [("lacks", missing), ("has in excess", extra), ("has of another shape", wrong)]
    if any(names for _, names in faults):
        text = "; ".join(f"{what} {len(names)}: {_some(names)}" for what, names in faults if names)
        raise InputError(
            f"The weights in {source} do not fit {type(network).__name__}: the file {text}. Check the architecture's "
            "settings against the ones of the training."
        )
    network.load_state_dict(
        {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}, assign=True
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _short(text: str) -> str:
    return text if len(text) < 200 else text[:200] + " ..."
