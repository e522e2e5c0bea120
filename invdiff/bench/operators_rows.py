"""What the benchmark of operators times: invdiff's, other libraries' and plain PyTorch's, with the same calls."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from invdiff.likelihoods import Gaussian
from invdiff.operators import (
    MRI,
    Blur,
    Downsampling,
    HighDynamicRange,
    Inpainting,
    InverseWaveletTransform,
    LinearOperator,
    Operator,
    PhaseRetrieval,
    Tomography,
    WaveletTransform,
    cartesian_mask,
    gaussian_kernel,
    motion_kernel,
    random_mask,
)

Call = Callable[[Tensor], Any]
CALLS = ("forward", "adjoint", "gradient", "prox")
NOISE = 0.05


@dataclass(frozen=True)
class Entry:
    """One library's way to do one row.

    Parameters
    ----------
    calls
        What it can do of `CALLS`, each a function of one batch. "gradient" is the log-likelihood of the measurement of
        a picture of zeros and its gradient at a batch, "prox" the proximal step with weight 1 from a batch.
    how
        How it computes.
    """

    calls: Mapping[str, Call]
    how: str = ""


def _kernel(k: Tensor, device: torch.device) -> Tensor:
    return k.float().to(device)


def _operators(size: int) -> Iterator[tuple[str, Callable[[], Operator]]]:
    shape, motion = (3, size, size), motion_kernel(61)
    yield "motion blur 61, circular", lambda: Blur(motion, shape, "circular")
    yield "motion blur 61, valid", lambda: Blur(motion, shape, "valid")
    yield "motion blur 61, reflect", lambda: Blur(motion, shape, "reflect")
    yield "Gaussian blur 23, reflect", lambda: Blur(gaussian_kernel(23, 3.0), shape)
    yield "motion blur 5, reflect", lambda: Blur(motion_kernel(5), shape)
    yield "inpainting", lambda: Inpainting(random_mask(shape[1:], 0.5), shape)
    yield "high dynamic range", lambda: HighDynamicRange(shape)
    for factor in (2, 4, 8):
        yield f"down-sampling {factor}, bicubic", partial(Downsampling, shape, factor)
    yield "tomography, 60 angles", lambda: Tomography((1, size, size), 60)
    yield "phase retrieval, 2x", lambda: PhaseRetrieval(shape, 2.0)
    volume = (1, 16, size, size)
    yield "wavelets db4, 2-D", lambda: WaveletTransform(shape, mode="symmetric")
    yield "wavelets db4, 2-D, inverse", lambda: InverseWaveletTransform(shape, mode="symmetric")
    yield "wavelets db4, 3-D", lambda: WaveletTransform(volume, mode="symmetric")
    yield "wavelets db4, 3-D, inverse", lambda: InverseWaveletTransform(volume, mode="symmetric")
    yield "MRI, 4x", lambda: MRI(cartesian_mask((size, size), 4.0), (2, size, size))


def _ours(A: Operator, device: torch.device) -> Entry:
    zero = torch.zeros(1, *A.in_shape, device=device)
    with torch.no_grad():
        y = A(zero)
    likelihood = Gaussian(A, y[0], NOISE).to(device)
    calls: dict[str, Call] = {"forward": A, "gradient": likelihood.log_prob_and_grad}
    if isinstance(A, LinearOperator):
        calls |= {"adjoint": A.adjoint, "prox": lambda x: A.prox(x, y.expand(len(x), *A.out_shape), 1.0)}
    return Entry(calls, A.chosen_method(device) if isinstance(A, Blur) else "")


def _physics(p: Any, shape: tuple[int, ...], device: torch.device, how: str) -> Entry:
    p = p.to(device)
    with torch.no_grad():
        y = p.A(torch.zeros(1, *shape, device=device))

    def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        w = (y - p.A(x)) / NOISE
        return -0.5 * w.flatten(1).square().sum(1), p.A_adjoint(w / NOISE)

    def prox(x: Tensor) -> Any:
        return p.prox_l2(x, y.expand(len(x), *y.shape[1:]), 1.0)

    return Entry({"forward": p.A, "adjoint": p.A_adjoint, "gradient": gradient, "prox": prox}, how)


def _deepinv(row: str, size: int, device: torch.device) -> dict[str, Entry]:
    from deepinv import physics

    shape, motion = (3, size, size), motion_kernel(61).float()[None, None]
    if row.startswith("motion blur 61"):
        boundary = row.split(", ")[1]
        entries = {"deepinv": _physics(physics.Blur(filter=motion, padding=boundary), shape, device, "its default")}
        if boundary != "reflect":
            fft = physics.Blur(filter=motion, padding=boundary, use_fft=True)
            entries["deepinv (fft)"] = _physics(fft, shape, device, "use_fft=True")
        if boundary == "circular":
            entries["deepinv (BlurFFT)"] = _physics(physics.BlurFFT(shape, filter=motion), shape, device, "BlurFFT")
        return entries
    if row == "Gaussian blur 23, reflect":
        kernel = gaussian_kernel(23, 3.0).float()[None, None]
        return {"deepinv": _physics(physics.Blur(filter=kernel, padding="reflect"), shape, device, "its default")}
    if row == "motion blur 5, reflect":
        kernel = motion_kernel(5).float()[None, None]
        return {"deepinv": _physics(physics.Blur(filter=kernel, padding="reflect"), shape, device, "its default")}
    if row == "inpainting":
        mask = random_mask(shape[1:], 0.5).float()
        return {"deepinv": _physics(physics.Inpainting(img_size=shape, mask=mask), shape, device, "same-shape output")}
    if row.startswith("down-sampling"):
        factor = int(row.split()[1].rstrip(","))
        p = physics.Downsampling(img_size=shape, filter="bicubic", factor=factor, padding="circular")
        return {"deepinv": _physics(p, shape, device, "circular boundary")}
    if row.startswith("tomography"):
        p = physics.Tomography(angles=60, img_width=size, circle=False, normalize=False)
        return {"deepinv": _physics(p, (1, size, size), device, "its default")}
    if row.startswith("MRI"):
        mask = cartesian_mask((size, size), 4.0).float()
        p = physics.MRI(mask=mask[None, None].expand(1, 2, size, size).clone(), img_size=(2, size, size))
        return {"deepinv": _physics(p, (2, size, size), device, "its default")}
    return {}


def _wavelets(A: Operator, device: torch.device) -> dict[str, Entry]:
    """PyWavelets, on a CPU and without an adjoint, and ptwt; the same coefficients in the same places."""
    ptwt: Any = import_module("ptwt")
    pywt: Any = import_module("pywt")
    assert isinstance(A, (WaveletTransform, InverseWaveletTransform))
    names, axes = ["".join(letters) for letters in product("ad", repeat=A.axes)], tuple(range(-A.axes, 0))
    if isinstance(A, WaveletTransform):

        def theirs(x: Tensor) -> Tensor:
            c = pywt.dwtn(x.numpy(), A.wavelet, A.mode, axes)
            return torch.stack([torch.from_numpy(c[name]) for name in names], 2).flatten(1, 2)

        def torchs(x: Tensor) -> Tensor:
            if A.axes == 3:
                low, high = ptwt.wavedec3(x, A.wavelet, mode=A.mode, level=1)
                c = {names[0]: low, **high}
            else:
                low, (da, ad, dd) = ptwt.wavedec2(x, A.wavelet, mode=A.mode, level=1)
                c = {"aa": low, "ad": ad, "da": da, "dd": dd}
            return torch.stack([c[name] for name in names], 2).flatten(1, 2)

    else:

        def bands(x: Tensor) -> tuple[Tensor, ...]:
            return x.reshape(len(x), A.out_shape[0], -1, *x.shape[2:]).unbind(2)

        def theirs(x: Tensor) -> Tensor:
            c = {name: band.numpy() for name, band in zip(names, bands(x), strict=True)}
            return torch.from_numpy(pywt.idwtn(c, A.wavelet, A.mode, axes))

        def torchs(x: Tensor) -> Tensor:
            c = dict(zip(names, bands(x), strict=True))
            low = c.pop(names[0])
            if A.axes == 3:
                volume: Tensor = ptwt.waverec3((low, c), A.wavelet)
                return volume
            picture: Tensor = ptwt.waverec2((low, ptwt.WaveletDetailTuple2d(c["da"], c["ad"], c["dd"])), A.wavelet)
            return picture

    entries = {"ptwt": Entry({"forward": torchs}, "its default")}
    if device.type == "cpu":
        entries["PyWavelets"] = Entry({"forward": theirs}, "one thread, compiled")
    return entries


def _plain(row: str, size: int, device: torch.device) -> dict[str, Entry]:
    """Lines that one writes without a library; the gradient by autograd."""
    f: Call
    if row in ("Gaussian blur 23, reflect", "motion blur 5, reflect"):
        k = _kernel(gaussian_kernel(23, 3.0) if row.startswith("G") else motion_kernel(5), device)
        weight, half = k.flip(0, 1).expand(3, 1, -1, -1).contiguous(), len(k) // 2
        f = lambda x: functional.conv2d(functional.pad(x, [half] * 4, mode="reflect"), weight, groups=3)  # noqa: E731
        how = "pad and conv2d"
    elif row == "motion blur 61, circular":
        h = torch.fft.rfft2(_kernel(motion_kernel(61), device), s=(size, size))
        f = lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * h, s=(size, size))  # noqa: E731
        how = "rfft2, product, irfft2"
    elif row == "inpainting":
        mask = random_mask((size, size), 0.5).float().to(device)
        f, how = (lambda x: x * mask), "product, same-shape output"
    elif row == "high dynamic range":
        f, how = (lambda x: (2.0 * x - 0.5).clamp(0.0, 1.0)), "product and clamp"
    elif row.startswith("down-sampling"):
        factor = int(row.split()[1].rstrip(","))
        f = lambda x: functional.interpolate(x, scale_factor=1 / factor, mode="bicubic", antialias=True)  # noqa: E731
        how = "interpolate(antialias=True)"
    else:
        return {}
    y = f(torch.zeros(1, 3, size, size, device=device))

    def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = -0.5 * ((y - f(leaf)) / NOISE).flatten(1).square().sum(1)
            return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    return {"torch": Entry({"forward": f, "gradient": gradient}, how)}


def names() -> list[str]:
    """Return the names of all rows."""
    return [name for name, _ in _operators(64)]


def row(name: str, size: int, device: torch.device) -> tuple[tuple[int, ...], dict[str, Entry]]:
    """Build one row: the shape of one input, and each library's entry; deepinv's where it is installed.

    Raises
    ------
    ShapeError
        If the operator's kernel is too large for the size.
    """
    A = dict(_operators(size))[name]().to(device)
    entries = {"invdiff": _ours(A, device), **_plain(name, size, device)}
    if name.startswith("wavelets"):
        entries |= _wavelets(A, device)
    elif find_spec("deepinv") is not None:
        entries |= _deepinv(name, size, device)
    return A.in_shape, entries
