"""Residuals of Gaussian likelihoods against float64, and the likelihoods that use them against autograd."""

import subprocess
import sys
from math import nan

import pytest
import torch
from processes import check_alone, has_gpu, has_triton

from invdiff import kernels
from invdiff.errors import InputError, ShapeError
from invdiff.kernels import gaussian_misfit as room
from invdiff.kernels.gaussian_misfit import chi_square, cpu, misfit, reference
from invdiff.likelihoods import Gaussian
from invdiff.operators import Blur, Dense, PhaseRetrieval, gaussian_kernel
from invdiff.operators.base import LinearOperator

SIZES = [(1, 1), (3, 18), (2, 1030), (0, 8), (2, 9000)]
"""Rows and values a row: one block or segment, several, ragged ones, none."""
EXACT = ((torch.float64, 1e-14), (torch.float32, 1e-6))
HALF = ((torch.bfloat16, 1e-2), (torch.float16, 1e-3))


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def complex_rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.view_as_complex(rand(*shape, 2, seed=seed))


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert bool(torch.isfinite(got).all())
    if expected.numel():
        assert float(((got.cpu().double() - expected).abs() / expected.abs().max()).max()) < tolerance


def check(version, device: str, kinds) -> None:
    """Both functions of a version, with poisoned outputs."""
    empty = torch.empty
    torch.empty = lambda *a, **k: empty(*a, **k).fill_(nan)
    try:
        for n, m in SIZES[:4] if "gpu" in version.__name__ and device == "cpu" else SIZES:
            for dtype, tolerance in kinds:
                p = rand(n, 2 * m)[:, ::2].to(dtype)
                for y in (rand(n, m, seed=1).to(dtype), rand(1, m, seed=2).to(dtype).expand(max(n, 1), m)[:1]):
                    stds = [torch.tensor([0.7], dtype=torch.float64), rand(m, seed=3).abs() + 0.3]
                    if m % 2 == 0:  # the real and the imaginary part of a value share theirs
                        stds.append((rand(2 * m, seed=4).abs() + 0.3)[:m:2])
                    for std in stds:
                        each = std if len(std) in (1, m) else torch.stack((std, std), 1).flatten()
                        w = (y.double() - p.double()) / each
                        arguments = [t.to(device) for t in (p, y, std)]
                        chi2, gradient = version.misfit(*arguments)
                        assert chi2.dtype == gradient.dtype == dtype
                        close(chi2, (w**2).sum(1), tolerance)
                        close(gradient, w / each, tolerance)
                        close(version.chi_square(*arguments), (w**2).sum(1), tolerance)
                        if dtype in (torch.float32, torch.float64):
                            plain = (y - p) / each.to(dtype) / each.to(dtype)
                            assert torch.equal(gradient.cpu(), plain), "quotients are rounded as PyTorch's"
    finally:
        torch.empty = empty


def test_compiled():
    check(cpu, "cpu", EXACT)


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_the_definition(kind, name, monkeypatch):
    monkeypatch.setattr(room, "_LEAST", 1 if name == "cpu" else 10**9)
    make = rand if kind == "real" else complex_rand
    p, y = make(3, 14)[:, ::2], make(3, 7, seed=1)
    if kind == "complex":
        p = p.conj()
    for std in (torch.tensor([0.4]), rand(7, seed=2).abs() + 0.3):
        for measured in (y, y[:1]):
            w = (measured - p) / std.double()
            chi2, gradient = misfit(p, measured, std.double())
            torch.testing.assert_close(chi2, (w.abs() ** 2).sum(1), rtol=1e-14, atol=0)
            torch.testing.assert_close(gradient, w / std.double(), rtol=1e-14, atol=0)
            torch.testing.assert_close(chi_square(p, measured, std.double()), chi2, rtol=1e-14, atol=0)


def test_what_is_not_a_number_stays_so():
    for version in (reference, cpu):
        chi2, gradient = version.misfit(torch.tensor([[0.5, nan], [0.5, 0.5]]), torch.zeros(1, 2), torch.ones(1))
        assert chi2.isnan().tolist() == [True, False]
        assert gradient.isnan().tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("make", [rand, complex_rand], ids=["real", "complex"])
def test_derivatives_of_both_results(make, diagonal, monkeypatch):
    monkeypatch.setattr(room, "_LEAST", 1)
    p, y = make(2, 4).requires_grad_(), make(1, 4, seed=1)
    std = rand(4, seed=2).abs() + 0.5 if diagonal else torch.tensor([0.6]).double()
    called = []
    run = cpu.misfit
    monkeypatch.setattr(cpu, "misfit", lambda *a: called.append(1) or run(*a))
    with torch.random.fork_rng(devices=[]):  # the check of second derivatives draws its own vectors
        for function in (misfit, chi_square):
            assert torch.autograd.gradcheck(function, (p, y, std))
            assert torch.autograd.gradgradcheck(function, (p, y, std))
    assert called


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # PyTorch's own, of tangents
def test_transforms_and_tangents_take_the_reference(monkeypatch):
    monkeypatch.setattr(room, "_LEAST", 1)
    monkeypatch.delattr(cpu, "misfit")  # whatever calls it fails
    monkeypatch.delattr(cpu, "chi_square")
    p, y, std = rand(3, 4), rand(1, 4, seed=1), torch.tensor([0.6]).double()
    expected = reference.misfit(p, y, std)
    mapped = torch.func.vmap(lambda t: misfit(t[None], y, std)[1][0])(p)
    torch.testing.assert_close(mapped, expected[1], rtol=1e-14, atol=0)
    slope = torch.func.grad(lambda t: chi_square(t, y, std).sum())(p)
    torch.testing.assert_close(slope, -2.0 * expected[1], rtol=1e-14, atol=0)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(p, torch.ones_like(p))
        tangent = torch.autograd.forward_ad.unpack_dual(chi_square(dual, y, std)).tangent
    torch.testing.assert_close(tangent, -2.0 * expected[1].sum(1), rtol=1e-14, atol=0)
    weighted = y.clone().requires_grad_()  # a measurement that is itself optimised
    (slope,) = torch.autograd.grad(chi_square(p, weighted, std).sum(), weighted)
    torch.testing.assert_close(slope, 2.0 * expected[1].sum(0, keepdim=True), rtol=1e-14, atol=1e-14)
    with kernels.use("reference"):
        assert torch.equal(misfit(p, y, std)[1], expected[1])


@pytest.mark.slow
def test_it_compiles_whole():
    # In a process of its own: the checker of shapes, which the tests switch on, cannot be traced.
    source = """
import torch
from invdiff.kernels import gaussian_misfit as room
room._LEAST = 1
p, y, std = torch.rand(3, 5), torch.rand(1, 5), torch.ones(5)
expected = room.misfit(p, y, std)
for got, right in zip(torch.compile(room.misfit, fullgraph=True, backend="aot_eager")(p, y, std), expected):
    torch.testing.assert_close(got, right)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Fourier(LinearOperator):
    complex_output = True

    def __init__(self, n: int) -> None:
        super().__init__((n,), (n,))

    def forward(self, x):
        return torch.fft.fft(x)

    def adjoint(self, y):
        return (torch.fft.ifft(y) * y.shape[-1]).real


OPERATORS = {
    "blur": lambda: Blur(gaussian_kernel(5, 1.0), (3, 9, 8)),
    "dense": lambda: Dense(rand(7, 5), (5,)),
    "complex": lambda: Fourier(6),
    "nonlinear": lambda: PhaseRetrieval((2, 6, 5)),
}


@pytest.mark.parametrize("noise", ["scalar", "one value", "diagonal", "broadcast"])
@pytest.mark.parametrize("name", OPERATORS)
def test_likelihoods_agree_with_autograd_of_the_definition(name, noise, monkeypatch):
    A = OPERATORS[name]()
    x = rand(4, *A.in_shape)
    y = A(rand(1, *A.in_shape, seed=1)) + 0.1
    several = y * torch.arange(1.0, 5.0).reshape(-1, *[1] * (y.ndim - 1))
    std = {
        "scalar": 0.3,
        "one value": torch.tensor([0.3]),
        "diagonal": rand(*A.out_shape, seed=2).abs() + 0.2,
        "broadcast": (rand(*A.out_shape[:1], *[1] * (len(A.out_shape) - 1), seed=2).abs() + 0.2),
    }[noise]
    for measurement in (y[0], several):
        likelihood = Gaussian(A, measurement, std)
        results = {}
        for least in (1, 10**9):
            monkeypatch.setattr(room, "_LEAST", least)
            leaf = x.clone().requires_grad_()
            w = (likelihood.measurement - A(leaf)) / torch.as_tensor(std, dtype=torch.float64)
            chi2 = (w.abs() ** 2).flatten(1).sum(1)
            (slope,) = torch.autograd.grad(-0.5 * chi2.sum(), leaf)
            value, grad = likelihood.log_prob_and_grad(x)
            assert not value.requires_grad
            assert not grad.requires_grad
            torch.testing.assert_close(value, -0.5 * chi2.detach() + likelihood.log_normaliser(), rtol=1e-13, atol=0)
            torch.testing.assert_close(grad, slope, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(likelihood.deviance(x), chi2.detach(), rtol=1e-13, atol=0)
            torch.testing.assert_close(likelihood.log_prob(x), value, rtol=1e-13, atol=0)
            (by_autograd,) = torch.autograd.grad(likelihood.log_prob(leaf).sum(), leaf)
            torch.testing.assert_close(by_autograd, slope, rtol=1e-12, atol=1e-12)
            if isinstance(A, LinearOperator):  # a linear operator's are differentiable themselves
                value, grad = likelihood.log_prob_and_grad(leaf)
                assert value.requires_grad
                v = rand(*x.shape, seed=5)
                (hessian,) = torch.autograd.grad((grad * v).sum(), leaf)
                s = torch.as_tensor(std, dtype=torch.float64)
                torch.testing.assert_close(hessian, -A.adjoint(A(v) / s / s), rtol=1e-12, atol=1e-12)
            results[least] = (value.detach(), grad.detach())
        torch.testing.assert_close(results[1][0], results[10**9][0], rtol=1e-13, atol=0)
        torch.testing.assert_close(results[1][1], results[10**9][1], rtol=1e-13, atol=1e-13)
        if not A.complex_output:  # PyTorch divides complex values by its own formula
            assert torch.equal(results[1][1], results[10**9][1]), "real gradients do not depend on the version at all"


def test_one_picture_against_several_measurements():
    A = Dense(rand(7, 5), (5,))
    y, x = rand(3, 7, seed=1), rand(1, 5, seed=2)
    likelihood = Gaussian(A, y, 0.5)
    apart = [Gaussian(A, one, 0.5).log_prob_and_grad(x) for one in y]
    value, grad = likelihood.log_prob_and_grad(x)
    torch.testing.assert_close(value, torch.cat([v for v, _ in apart]))
    torch.testing.assert_close(grad, torch.cat([g for _, g in apart]))
    with pytest.raises(ShapeError, match=r"\(1 or n, m\), got \(2, 7\) and \(3, 7\)"):
        likelihood.log_prob(rand(2, 5))


def test_a_more_precise_measurement_decides_the_precision_of_complex_residuals():
    A = Fourier(6)
    x = rand(2, 6).float()
    likelihood = Gaussian(A, complex_rand(6), 0.5)
    value, grad = likelihood.log_prob_and_grad(x)
    assert value.dtype == grad.dtype == torch.float64
    torch.testing.assert_close(grad, likelihood.log_prob_and_grad(x.double())[1], rtol=1e-5, atol=1e-5)
    real = Gaussian(Dense(rand(7, 5), (5,)), rand(7), 0.5).log_prob_and_grad(rand(2, 5).float())
    assert real[0].dtype == real[1].dtype == torch.float32


def test_broadcast_noise_follows_the_buffer():
    A = Blur(gaussian_kernel(5, 1.0), (3, 9, 8))
    likelihood = Gaussian(A, torch.zeros(3, 9, 8).double(), torch.tensor([0.5, 1.0, 2.0]).reshape(3, 1, 1))
    x = rand(2, 3, 9, 8)
    before = likelihood.deviance(x)
    likelihood.noise_std.mul_(2.0)
    torch.testing.assert_close(likelihood.deviance(x), before / 4.0)


def test_bad_input_is_told(unchecked):
    p, y, std = torch.zeros(2, 4), torch.zeros(1, 4), torch.ones(1)
    with pytest.raises(ShapeError, match=r"got \(2, 4\) and \(1, 3\)"):
        misfit(p, y[:, :3], std)
    with pytest.raises(ShapeError, match=r"got \(2, 4\) and \(3, 4\)"):
        chi_square(p, torch.zeros(3, 4), std)
    with pytest.raises(ShapeError, match=r"1 or 4 values along one axis, got \(3,\)"):
        misfit(p, y, torch.ones(3))
    with pytest.raises(InputError, match="bring them together"):
        misfit(p, y.double(), std)


SCRIPT = """
from test_kernel_misfit import check, EXACT, HALF
from invdiff.kernels.gaussian_misfit import gpu
check(gpu, {device!r}, EXACT + HALF)
"""


@has_triton
def test_triton_in_the_interpreter():
    check_alone(SCRIPT.format(device="cpu"), interpret=True)


def check_likelihoods() -> None:
    """Likelihoods on the GPU with the kernel against those without, and without a wait for the device."""
    kernels.ON_GPU |= {"gaussian_misfit"}
    for name, make in OPERATORS.items():
        A = make().to("cuda")
        x = rand(4, *A.in_shape).cuda()
        for std in (0.3, rand(*A.out_shape, seed=2).abs() + 0.2):
            likelihood = Gaussian(A, (A(x[:1]) + 0.1)[0], std.cuda() if isinstance(std, torch.Tensor) else std).cuda()
            x = rand(4, *A.in_shape, seed=3).cuda()
            likelihood.log_prob_and_grad(x)
            torch.cuda.set_sync_debug_mode("error")
            value, grad = likelihood.log_prob_and_grad(x)
            torch.cuda.set_sync_debug_mode("default")
            with kernels.use("reference"):
                expected = likelihood.log_prob_and_grad(x)
            torch.testing.assert_close(value, expected[0], rtol=1e-12, atol=0)
            torch.testing.assert_close(grad, expected[1], rtol=1e-12, atol=1e-12)
            leaf = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(likelihood.log_prob(leaf).sum(), leaf)
            torch.testing.assert_close(slope, grad, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.gpu
@has_gpu
def test_triton_on_the_gpu():
    script = SCRIPT.format(device="cuda") + "from test_kernel_misfit import check_likelihoods\ncheck_likelihoods()"
    check_alone(script, interpret=False)
