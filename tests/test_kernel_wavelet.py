"""Wavelet filter banks against PyWavelets in float64: every basis and boundary, adjoints, gradients, Triton."""

from typing import get_args

import numpy as np
import pytest
import pywt
import torch
from processes import check_alone, has_gpu, has_triton

from invdiff import kernels
from invdiff.errors import CatalogueError, InputError, ShapeError
from invdiff.kernels import wavelet as room
from invdiff.kernels.wavelet import Bank, banks, cpu, merge, reference, split
from invdiff.kernels.wavelet.filters import Mode

MODES = get_args(Mode)
SOME = ("haar", "db4", "sym5", "bior1.3", "bior2.4", "rbio3.5")
CPU = torch.device("cpu")


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(length: int, wavelet: str = "db4", mode: str = "symmetric", dtype: torch.dtype = torch.float64):
    return banks(length, wavelet, mode, dtype, CPU)


def error(got: torch.Tensor, expected) -> float:
    """Largest error relative to the largest value; infinite where something was not written."""
    expected = torch.as_tensor(expected)
    assert got.shape == expected.shape
    gap = (got.double() - expected).abs()
    assert bool(torch.isfinite(gap).all())
    return float(gap.max() / expected.abs().max().clamp_min(1e-30)) if expected.numel() else 0.0


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with NaN, so that what a kernel does not write shows."""
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: t.fill_(torch.nan) if (t := empty(*a, **k)).is_floating_point() else t
    )


@pytest.mark.parametrize("mode", MODES)
def test_every_basis_is_that_of_pywavelets(mode):
    for name in pywt.wavelist(kind="discrete"):
        for length in (7, 40):
            x = rand(3, length)
            low, high = pywt.dwt(x.numpy(), name, mode, axis=-1)
            analysis, synthesis = pair(length, name, mode)
            with kernels.use("reference"):
                c = split(x[None, ..., None], analysis)
                back = merge(c, synthesis)
            assert error(c[0, ..., 0], np.stack((low, high))) < 1e-12
            # Signals come back, to the rounding of the published filters (the Meyer wavelet's are cut short).
            again = pywt.idwt(low, high, name, mode, axis=-1)[..., :length]
            assert error(back[0, ..., 0], again) < 1e-12
            assert error(back[0, ..., 0], x) < (1e-2 if name == "dmey" else 1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_compiled_sums(mode, monkeypatch):
    """Rows, short lines and long lines, odd and even, longer and shorter than the filters, in both directions."""
    poison(monkeypatch)
    for name in SOME:
        for length in (2, 9, 40, 41, 261):
            for inner in (1, 3, 17) if length == 9 else (1, 17):
                x = rand(2, 3, length, inner, seed=length)
                expected = np.stack(pywt.dwt(x.numpy(), name, mode, axis=2), 1)
                again = pywt.idwt(expected[:, 0], expected[:, 1], name, mode, axis=2)[:, :, :length]
                for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
                    analysis, synthesis = pair(length, name, mode, dtype)
                    c = split(x.to(dtype), analysis)
                    assert c.dtype == dtype
                    assert error(c, expected) < tolerance
                    assert error(merge(torch.tensor(expected, dtype=dtype), synthesis), again) < tolerance


def test_long_lines_take_their_own_way(monkeypatch):
    called = []
    for name in ("split_lines", "merge_lines"):
        kernel = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda kernel=kernel, name=name: called.append(name) or kernel())
    analysis, synthesis = pair(300)
    merge(split(rand(1, 2, 300, 1), analysis), synthesis)
    assert called == ["split_lines", "merge_lines"]
    analysis, synthesis = pair(100)
    merge(split(rand(1, 2, 100, 1), analysis), synthesis)
    assert len(called) == 2


@pytest.mark.parametrize("batch", [0, 1, 300])
@pytest.mark.parametrize("threads", [1, 2])
def test_batches_strides_and_threads(batch, threads, monkeypatch):
    poison(monkeypatch)
    monkeypatch.setattr(cpu, "_LEAST", 1)
    analysis, synthesis = pair(33, "bior2.4", "reflect")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for inner in (1, 5):
            x = rand(2, batch, 66, inner, seed=1).transpose(0, 1)[:, :, ::2]
            c = split(x, analysis)
            assert c.shape == (batch, 2, 2, 21, inner)
            with kernels.use("reference"):
                assert error(c, split(x, analysis)) < 1e-13
                back = merge(c, synthesis)
            strided = c.transpose(1, 2).contiguous().transpose(1, 2)
            assert error(merge(strided, synthesis), back) < 1e-13
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mode", MODES)
def test_adjoint_and_gradients(mode):
    for bank in pair(11, "bior2.4", mode):
        x, y = rand(2, 2, 11, 3), rand(2, 2, 2, bank.size, 3, seed=1)
        bands, signals = split(x, bank), merge(y, bank)
        assert float((bands * y).sum()) == pytest.approx(float((x * signals).sum()), rel=1e-12)
        for function, at, other in ((split, x, bands), (merge, y, signals)):
            leaf = at.clone().requires_grad_()
            assert torch.autograd.gradcheck(lambda t, f=function, b=bank: f(t, b), (leaf,), fast_mode=True)
            assert torch.autograd.gradgradcheck(
                lambda t, f=function, b=bank: f(t, b) ** 2, (leaf,), (other.clone().requires_grad_(),), fast_mode=True
            )
            mapped = torch.func.vmap(lambda t, f=function, b=bank: f(t, b), in_dims=1)(torch.stack((at, 2 * at), dim=1))
            torch.testing.assert_close(mapped, torch.stack((other, 2 * other)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_operation_is_well_formed():
    bank = pair(12)[0]
    for t, forward in ((rand(2, 1, 12, 2), True), (rand(2, 2, 1, bank.size, 2), False)):
        arguments = (t.requires_grad_(), bank.forward, bank.transposed, bank.length, bank.size, forward)
        torch.library.opcheck(room._bank_operation, arguments)


def test_reference_of_long_signals_is_tap_by_tap(monkeypatch):
    dense = pair(21, "sym5", "constant")
    monkeypatch.setattr(reference, "DENSE", 0)
    for bank, written in zip(pair(21, "sym5", "constant"), dense, strict=True):
        assert bank.dense is None
        assert written.dense is not None
        x, y = rand(2, 2, 21, 3), rand(2, 2, 2, bank.size, 3, seed=1)
        with kernels.use("reference"):
            assert error(split(x, bank), split(x, written)) < 1e-14
            assert error(merge(y, bank), merge(y, written)) < 1e-14


def test_one_value_alone_is_repeated_where_it_would_be_mirrored():
    # PyWavelets refuses to reflect it.
    analysis, synthesis = pair(1, "db4", "reflect")
    constant, _ = pair(1, "db4", "constant")
    x = rand(1, 1, 1, 1)
    assert torch.equal(split(x, analysis), split(x, constant))
    assert error(merge(split(x, analysis), synthesis), x) < 1e-12


def test_half_types_take_the_reference():
    analysis, synthesis = pair(16, dtype=torch.bfloat16)
    x = rand(2, 1, 16, 1)
    back = merge(split(x.bfloat16(), analysis), synthesis)
    assert back.dtype == torch.bfloat16
    assert error(back, x) < 0.05


def test_bad_input_is_told(unchecked):
    analysis, _ = pair(12)
    with pytest.raises(CatalogueError, match=r"no discrete wavelet named 'db44'; did you mean 'db4'"):
        banks(12, "db44", "zero", torch.float64, CPU)
    with pytest.raises(CatalogueError, match="no discrete wavelet named 'morl'"):
        banks(12, "morl", "zero", torch.float64, CPU)
    with pytest.raises(CatalogueError, match=r"no boundary mode named 'symetric'; did you mean 'symmetric'"):
        banks(12, "db4", "symetric", torch.float64, CPU)
    with pytest.raises(InputError, match=r"at least one value, got 0"):
        banks(0, "db4", "zero", torch.float64, CPU)
    with pytest.raises(InputError, match=r"floating-point signals, got torch\.int64"):
        banks(12, "db4", "zero", torch.int64, CPU)
    with pytest.raises(ShapeError, match=r"must be \(o, d, 12, i\)"):
        split(rand(1, 1, 13, 1), analysis)
    with pytest.raises(ShapeError, match=r"must be \(o, 2, d, 9, i\)"):
        merge(rand(1, 2, 1, 8, 1), analysis)
    with pytest.raises(InputError, match=r"bank is torch\.float64 on cpu, the values torch\.float32"):
        split(rand(1, 1, 12, 1).float(), analysis)


def check_gathers(device: str) -> None:
    """The Triton kernel against the reference in float64, with poisoned outputs."""
    from invdiff.kernels.wavelet import gpu

    empty = torch.empty
    torch.empty = lambda *a, **k: empty(*a, **k).fill_(torch.nan)
    try:
        for mode in ("constant", "periodization"):
            for name, length in (("db4", 13), ("bior2.4", 8)):
                for inner, batch in ((1, 1), (3, 0)) if length == 8 else ((3, 1),):
                    x = rand(batch, 2, 2 * length, inner)[:, :, ::2]
                    for bank in pair(length, name, mode):
                        bands = reference.split(x, bank.forward, bank.dense)
                        signals = reference.merge(bands, bank.transposed, bank.dense.mT)
                        for dtype, tolerance in (
                            (torch.float64, 1e-13),
                            (torch.float32, 1e-6),
                            (torch.bfloat16, 4e-2),
                        ):
                            made = Bank(
                                bank.length,
                                bank.size,
                                *[
                                    [t.to(device, dtype if t.is_floating_point() else None) for t in tables]
                                    for tables in (bank.forward, bank.transposed)
                                ],
                                None,
                            )
                            got = gpu.split(x.to(device, dtype), made.forward, bank.size)
                            assert got.dtype == dtype
                            assert error(got.cpu(), bands) < tolerance
                            back = gpu.merge(bands.to(device, dtype), made.transposed, length)
                            assert error(back.cpu(), signals) < tolerance
    finally:
        torch.empty = empty


def check_transforms() -> None:
    """Whole transforms on the GPU in single precision against double."""
    cuda = torch.empty(0, device="cuda").device
    for length, inner in ((256, 1), (250, 60), (3000, 1)):
        analysis, synthesis = banks(length, "db4", "symmetric", torch.float32, cuda)
        x = rand(20, 30, length, inner)
        c = split(x.float().cuda(), analysis)
        assert error(c.cpu(), split(x, pair(length)[0])) < 1e-6
        assert error(merge(c, synthesis).cpu(), x) < 1e-5


@has_triton
def test_triton_in_the_interpreter():
    check_alone("from test_kernel_wavelet import check_gathers\ncheck_gathers('cpu')", interpret=True)


@pytest.mark.gpu
@has_gpu
def test_triton_on_the_gpu():
    script = (
        "from test_kernel_wavelet import check_gathers, check_transforms\ncheck_gathers('cuda')\ncheck_transforms()"
    )
    check_alone(script, interpret=False)
