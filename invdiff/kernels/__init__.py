"""Kernels: a folder each, with a reference in plain PyTorch and faster versions of one signature for some devices."""

from importlib.util import find_spec
from types import TracebackType
from typing import Literal, Self, final, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from invdiff.errors import InputError

Choice = Literal["auto", "reference"]
Version = Literal["reference", "cpu", "gpu"]

ON_GPU = frozenset(
    {
        "burgers_trajectory",
        "flow_trajectory",
        "fourier_magnitude",
        "gaussian_misfit",
        "philox_normal",
        "philox_uniform",
        "pixelwise",
        "separable_stencil",
        "spectral_misfit",
        "wavelet",
    }
)
"""Kernels whose Triton version was compiled and compared with float64 on a GPU. The others have run in Triton's
interpreter alone, and take their reference on CUDA until they are added here."""

_choice: Choice = "auto"


@final
class use:  # noqa: N801  a function to its users, which also serves as a context
    """Choose which version of every kernel runs: ``use("reference")`` for good, or ``with use("reference"): ...``.

    The choice is the process's, not the thread's: PyTorch runs gradients of a GPU's work in threads of its own, and
    they must take the same version as the call. It holds from the call on; leaving the context restores what was chosen
    when `use` was called. Contexts of several threads that overlap therefore disturb each other (the results differ by
    rounding, never more). Other processes begin with "auto".

    Parameters
    ----------
    name
        "auto" takes the fastest version by device and size; "reference" plain PyTorch, to find out whether a kernel is
        to blame.

    Raises
    ------
    InputError
        If the name is neither.
    """

    def __init__(self, name: Choice) -> None:
        global _choice
        if name not in get_args(Choice):
            raise InputError(f"invdiff.kernels.use takes {' or '.join(map(repr, get_args(Choice)))}, got {name!r}.")
        self._before, _choice = _choice, name

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _choice
        _choice = self._before


def chosen() -> Choice:
    """Return what `use` chose last."""
    return _choice


_HAS_TRITON = find_spec("triton") is not None  # asked once: what compiles a model cannot follow the question


def plain(x: Tensor) -> bool:
    """Whether a kernel may be called as it is: nothing differentiates, traces or maps over the tensor.

    Else it is called through `torch.library`, which costs some 30 us, and at the first call a second for imports.
    """
    return (
        type(x) is Tensor
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and forward_ad._current_level < 0  # a tangent would be lost without a word
    )


def version(kernel: str, x: Tensor) -> Version:
    """Return which version of a kernel may run on a tensor.

    "gpu" on CUDA with Triton where the kernel is in `ON_GPU`, "cpu" on a CPU, else "reference".
    """
    if _choice == "reference":
        return "reference"
    if x.is_cuda:
        return "gpu" if kernel in ON_GPU and _HAS_TRITON else "reference"
    return "cpu" if x.device.type == "cpu" else "reference"
