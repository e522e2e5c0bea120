"""Priors on wavelet coefficients: the way out and back, exact Gaussian laws, sampling, and what is known."""

import pytest
import torch
from torch import nn

import invdiff
from invdiff.errors import CapabilityError, CatalogueError, InputError, ShapeError
from invdiff.event import Variable
from invdiff.likelihoods import Gaussian
from invdiff.operators import (
    BandRows,
    Blur,
    Inpainting,
    Reshape,
    WaveletDecoder,
    WaveletTransform,
    Window,
    gaussian_kernel,
    random_mask,
)
from invdiff.posterior import Posterior
from invdiff.priors import (
    ConditionalPrior,
    FieldPrior,
    GaussianPrior,
    MixturePrior,
    WaveletPrior,
    gaussian_wavelet_prior,
)
from invdiff.problem import Problem
from invdiff.samplers import TransportLangevin
from invdiff.testing import check_operator, check_prior

EVENT = (
    Variable(name="u", dims=("channel", "t", "x"), shape=(1, 5, 6), units="m s-1"),
    Variable(name="f", dims=("component", "window", "place"), shape=(1, 4, 6), units="m s-2"),
)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def field() -> FieldPrior:
    return FieldPrior.power_law((1, 8, 8), exponent=3.0, std=0.5, mean=0.2)


def decoder_of_two(wavelet: str = "haar", mode: str = "periodization", grid=(3, 4)) -> WaveletDecoder:
    """States of 5 rows and a forcing of 4 in the channels of one grid, as WDNO's of 81 and 80."""
    transforms = {v.name: WaveletTransform(v.shape, wavelet, mode=mode) for v in EVENT}
    scales = {"u": transforms["u"].by_band(torch.tensor([2.0, 0.5, 0.7, 0.3]))}
    offsets = {"f": transforms["f"].by_band(torch.tensor([1.0, 0.0, 0.0, 0.0]))}
    return WaveletDecoder(transforms, grid, scales=scales, offsets=offsets)


def joint_law() -> GaussianPrior:
    """A correlated law of states and forcing, flat, physical units."""
    t = torch.cat((torch.arange(5.0).repeat_interleave(6), torch.arange(4.0).repeat_interleave(6) + 0.5)).double()
    x = torch.arange(6.0).repeat(9).double()
    # Forcing and state are correlated where they are near in time and space.
    distance = ((t[:, None] - t) / 2.0) ** 2 + ((x[:, None] - x) / 3.0) ** 2
    C = 0.3 * (-0.5 * distance).exp() + 0.05 * torch.eye(len(t), dtype=torch.float64)
    return GaussianPrior(0.1 * rand(len(t), seed=3), C)


def test_the_way_out_and_back():
    for decoder in (
        decoder_of_two(),
        decoder_of_two("bior1.3", "zero", (6, 5)),
        WaveletDecoder(WaveletTransform((2, 9, 12), "db2", mode="symmetric"), (8, 8)),
    ):
        check_operator(decoder.linear)
        check_operator(decoder)
        x = rand(3, *decoder.out_shape)
        z = decoder.inverse(x)
        assert z.shape == (3, *decoder.in_shape)
        torch.testing.assert_close(decoder(z), x)
        seen = sum(P.adjoint(torch.ones(1, *P.out_shape).double()) for P in decoder._windows)
        assert not z[(seen == 0).expand_as(z)].any()
        torch.testing.assert_close(decoder(z + 7.0 * (seen == 0)), x, msg="what lies in the padding is not seen")
    decoder = decoder_of_two()
    assert decoder.in_shape == (8, 3, 4)
    assert decoder.channels == {"u": slice(0, 4), "f": slice(4, 8)}
    z = torch.zeros(1, 8, 3, 4, dtype=torch.float64)
    assert torch.equal(decoder(z)[:, :30], torch.zeros(1, 30, dtype=torch.float64))
    torch.testing.assert_close(decoder(z)[:, 30:], 0.5 * torch.ones(1, 24, dtype=torch.float64), msg="Haar's mean is 2")
    z[0, 1, 2, 1] = 1.0
    by_hand = WaveletTransform((1, 5, 6), "haar").inverse(
        torch.zeros(1, 4, 3, 3, dtype=torch.float64).index_put(
            tuple(torch.tensor([i]) for i in (0, 1, 2, 1)), torch.tensor(0.5, dtype=torch.float64)
        )
    )
    torch.testing.assert_close(decoder(z)[:, :30], by_hand.flatten(1))


def test_decoders_refuse_what_does_not_fit(unchecked):
    W = WaveletTransform((1, 8, 8), "haar")
    with pytest.raises(InputError, match="one variable at least"):
        WaveletDecoder({})
    with pytest.raises(CatalogueError, match="no variable named 'v'; did you mean"):
        WaveletDecoder({"va": W}, scales={"v": torch.ones(())})
    with pytest.raises(ShapeError, match=r"sides \(4, 4\) do not fit the grid \(3, 9\)"):
        WaveletDecoder(W, (3, 9))
    with pytest.raises(ShapeError, match="one number of axes"):
        WaveletDecoder({"a": W, "b": WaveletTransform((1, 8), "haar")})
    with pytest.raises(InputError, match="must be positive; those of 'x' are not"):
        WaveletDecoder(W, scales=torch.zeros(()))
    with pytest.raises(ShapeError, match="offset of 'x' does not broadcast"):
        WaveletDecoder(W, offsets=torch.zeros(3))
    with pytest.raises(ShapeError, match="do not hold equally many values"):
        WaveletDecoder(W, out_shape=(8, 7))
    with pytest.raises(ShapeError, match="Several variables come out flat"):
        WaveletDecoder({"a": W, "b": W}, out_shape=(128,))


def test_a_single_variable_may_have_no_channel():
    W = WaveletTransform((1, 8, 6), "db2", mode="symmetric")
    settings = {"scales": torch.tensor(0.5), "offsets": rand(*W.out_shape, seed=1)}
    plain, decoder = WaveletDecoder(W, **settings), WaveletDecoder(W, **settings, out_shape=(8, 6))
    check_operator(decoder)
    z, x = rand(2, *decoder.in_shape), rand(2, 8, 6, seed=2)
    assert torch.equal(decoder(z), plain(z)[:, 0])
    assert torch.equal(decoder.inverse(x), plain.inverse(x[:, None]))
    law = GaussianPrior(torch.zeros(8, 6, dtype=torch.float64), torch.eye(48, dtype=torch.float64))
    prior = gaussian_wavelet_prior(law, decoder)
    assert [v.shape for v in prior.event] == [(8, 6)]
    name = prior.event[0].name
    known = prior.condition({name: x[0]})  # the whole event is known, and nothing is left to a law
    torch.testing.assert_close(known.decode(known.denoise(z[:1], 1.0)), x[:1])


@pytest.mark.parametrize("mode", ["periodization", "symmetric"])
def test_the_exact_prior_keeps_the_contract(mode):
    W = WaveletTransform((1, 8, 8), "db2", mode=mode)
    prior = gaussian_wavelet_prior(field(), WaveletDecoder(W, (6, 6), scales=torch.tensor(0.5)))
    report = check_prior(prior, n=256)
    assert report.round_trip is not None
    # Redundant coefficients have no density at sigma = 0, but at every other.
    assert report.analytic


def test_posteriors_are_those_of_the_law_itself():
    """The same measurement conditions the field in its own values and in its coefficients."""
    law, A = field(), Inpainting(random_mask((8, 8), 0.4, seed=1), (1, 8, 8))
    y = A(law.sample(1, seed=5)) + 0.1 * rand(1, *A.out_shape)
    for W in (WaveletTransform((1, 8, 8), "db2", 1), WaveletTransform((1, 8, 8), "bior2.2", 1, "reflect")):
        decoder = WaveletDecoder(W, scales=W.by_band(torch.tensor([2.0, 0.5, 0.5, 0.1])), offsets=torch.tensor(0.3))
        inner = gaussian_wavelet_prior(law, decoder).prior
        here = GaussianPrior(inner.mean, inner.covariance, decoder=decoder).posterior(A, y, 0.1)
        there = law.posterior(A, y, 0.1)
        torch.testing.assert_close(decoder(here.mean[None])[0], there.mean)
        assert here.log_evidence == pytest.approx(there.log_evidence, rel=1e-8)
        L = decoder.linear(torch.eye(inner.size, dtype=torch.float64).reshape(-1, *inner.shape)).flatten(1)
        torch.testing.assert_close(L.mT @ here.covariance @ L, there.covariance)


def test_linear_measurements_stay_linear_problems():
    A = Blur(gaussian_kernel(3, 1.0), (1, 8, 8))
    decoder = WaveletDecoder(WaveletTransform((1, 8, 8), "db2"), (5, 5), offsets=torch.tensor(0.3))
    prior = gaussian_wavelet_prior(field(), decoder)
    problem = Problem.simulate(A, field().sample(1, seed=1)[0], noise_std=0.1, seed=2)
    posterior = Posterior(problem, prior, dtype=torch.float64)
    assert {"linear", "curvature", "denoiser", "gaussian"} <= posterior.capabilities
    z = rand(3, 4, 5, 5)
    r = posterior.linear.residual(z)
    assert isinstance(problem.likelihood, Gaussian)
    torch.testing.assert_close(r, problem.likelihood.measurement.double() - A(prior.decode(z)))
    value, gradient = posterior.log_likelihood_and_grad(z)
    torch.testing.assert_close(gradient, posterior.linear.operator.adjoint(r) / 0.01)
    assert value.shape == (3,)


@pytest.mark.parametrize("mode", ["periodization", "symmetric"])
def test_draws_are_those_of_the_exact_posterior(mode):
    law, A, n = field(), Inpainting(random_mask((8, 8), 0.5, seed=1), (1, 8, 8)), 400
    problem = Problem.simulate(A, law.sample(1, seed=5)[0], noise_std=0.1, seed=2)
    W = WaveletTransform((1, 8, 8), "db2", mode=mode)
    prior = gaussian_wavelet_prior(law, WaveletDecoder(W, (6, 6)))
    solution = Posterior(problem, prior, dtype=torch.float64).sample(
        TransportLangevin(steps=40, refreshes=4), draws=n, seed=3
    )
    exact = law.posterior(A, problem.likelihood.measurement, 0.1)
    L = torch.linalg.cholesky(exact.covariance)
    gap = solution.draws.double().reshape(n, -1) - exact.mean.flatten()
    white = torch.linalg.solve_triangular(L, gap.mT, upper=False)
    d = len(L)
    # n |mean|^2 is chi-square with d degrees of freedom; the mean square has variance 2 / (n d). Five deviations each.
    assert float(n * white.mean(1).square().sum()) < d + 5 * (2 * d) ** 0.5
    assert abs(float(white.square().mean()) - 1.0) < 5 * (2 / (n * d)) ** 0.5 + 0.02, "0.02 for the steps' bias"


def test_several_variables_and_a_known_forcing():
    law, decoder = joint_law(), decoder_of_two()
    prior = gaussian_wavelet_prior(law, decoder, EVENT)
    # Every fourth value of the state is seen.
    seen = torch.zeros(5, 6, dtype=torch.bool)
    seen.view(-1)[::4] = True
    A = Inpainting(seen, (1, 5, 6)) @ (Reshape((30,), (1, 5, 6)) @ Window((54,), (30,)))
    truth = law.sample(1, seed=1)[0]
    forcing = truth[30:].reshape(1, 4, 6)
    likelihood = Problem.simulate(A, truth, noise_std=0.1, seed=2).likelihood
    problem = Problem(likelihood, event=EVENT, given={"f": forcing})
    n = 300
    solution = Posterior(problem, prior, dtype=torch.float64).sample(
        TransportLangevin(steps=40, refreshes=4), draws=n, seed=3
    )
    assert set(solution.draws) == {"u", "f"}
    assert solution.draws["u"].shape == (n, 1, 5, 6)
    torch.testing.assert_close(solution.draws["f"].double(), forcing.expand(n, -1, -1, -1), rtol=0, atol=1e-3)
    flat = (Variable(name="u", dims=("i",), shape=(30,)), Variable(name="f", dims=("j",), shape=(24,)))
    known = GaussianPrior(law.mean, law.covariance, event=flat).condition({"f": forcing.flatten()})
    exact = known.posterior(A, likelihood.measurement, 0.1)
    L = torch.linalg.cholesky(exact.covariance[:30, :30])
    gap = solution.draws["u"].double().reshape(n, 30) - exact.mean[:30]
    white = torch.linalg.solve_triangular(L, gap.mT, upper=False)
    assert float(n * white.mean(1).square().sum()) < 30 + 5 * (2 * 30) ** 0.5
    assert abs(float(white.square().mean()) - 1.0) < 5 * (2 / (n * 30)) ** 0.5 + 0.02


class Shows(nn.Module):
    """A network that keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.detach().clone())
        return self.factor * x + c_noise.reshape(-1, 1, 1, 1) * 0 + x[:, -2:-1]


def test_a_network_is_told_what_is_known():
    network = Shows()
    inner = ConditionalPrior(network, (8, 3, 4), {"f": 4, "start": 2})
    start = BandRows((1, 6), (3, 4), "haar")
    prior = WaveletPrior(inner, decoder_of_two(), EVENT, conditions={"start": start})
    z = rand(2, 8, 3, 4).float()
    before = prior.denoise(z, 1.0)
    assert network.seen[-1].shape == (2, 8 + 4 + 1 + 2 + 1, 3, 4)
    assert not network.seen[-1][:, 8:].any(), "nothing is given"
    u0, f = rand(1, 6, seed=1).float(), rand(1, 4, 6, seed=2).float()
    known = prior.condition({"start": u0}).condition({"f": f})
    after = known.denoise(z, torch.tensor([1.0, 2.0]))
    shown = network.seen[-1]
    latent = prior.decoder.encode("f", f[None])[0, 4:]
    torch.testing.assert_close(shown[:, 8:12], latent.expand(2, -1, -1, -1))
    assert bool((shown[:, 12] == 1).all()), "the forcing is given"
    torch.testing.assert_close(shown[:, 13:15], start(u0[None]).expand(2, -1, -1, -1))
    assert bool((shown[:, 15] == 1).all())
    torch.testing.assert_close(after[:, 4:], latent.expand(2, -1, -1, -1), msg="known channels are what they are")
    assert not torch.equal(after[:1, :4], before[:1, :4])
    x = known.decode(after)
    torch.testing.assert_close(x[:, 30:], f.reshape(1, -1).expand(2, -1))
    assert len({prior.key, known.key, prior.condition({"f": f}).key, prior.condition({"start": u0}).key}) == 4
    torch.testing.assert_close(prior.denoise(z, 1.0), before, msg="the prior itself stays as it was")
    assert prior.condition({"f": f}).sample(2, seed=1).shape == (2, 8, 3, 4)
    assert prior.curvature is None
    assert not hasattr(prior, "log_prob")


def test_conditioning_refuses_what_it_does_not_know(unchecked):
    inner = ConditionalPrior(Shows(), (8, 3, 4), {"f": 4})
    prior = WaveletPrior(inner, decoder_of_two(), EVENT, conditions={"start": BandRows((1, 6), (3, 4), "haar")})
    with pytest.raises(
        CatalogueError, match="no variable or condition of the prior named 'sart'; did you mean 'start'"
    ):
        prior.condition({"sart": torch.zeros(1, 6)})
    with pytest.raises(ShapeError, match=r"given 'start' has shape \(5,\), needed is \(1, 6\)"):
        prior.condition({"start": torch.zeros(5)})
    with pytest.raises(CatalogueError, match="no condition of the network named 'start'"):
        prior.condition({"start": torch.zeros(1, 6)})
    with pytest.raises(ShapeError, match=r"condition 'f' has channels \(4, 3, 4\)"):
        inner.condition({"f": torch.zeros(3, 3, 4)})
    with pytest.raises(InputError, match="one channel at least"):
        ConditionalPrior(Shows(), (8, 3, 4), {"f": 0})

    class Plain:
        shape, sigma_min, sigma_max = (8, 3, 4), 0.01, 10.0

        def denoise(self, z, sigma):
            return z

    with pytest.raises(CapabilityError, match="Plain has no condition"):
        WaveletPrior(Plain(), decoder_of_two(), EVENT).condition({"f": torch.zeros(1, 4, 6)})
    with pytest.raises(ShapeError, match=r"the decoder takes \(8, 3, 5\)"):
        WaveletPrior(Plain(), decoder_of_two(grid=(3, 5)), EVENT)
    with pytest.raises(ShapeError, match="they must be the same"):
        WaveletPrior(Plain(), decoder_of_two(), EVENT[::-1])
    plain = [Variable(name=v.name, dims=v.dims[1:], shape=v.shape[1:]) for v in EVENT]
    assert WaveletPrior(Plain(), decoder_of_two(), tuple(plain)).event == tuple(plain), "one channel needs no axis"
    for wrong in (plain[::-1], [*plain, plain[0]], [plain[0], Variable(name="f", dims=("i",), shape=(24,))]):
        with pytest.raises(ShapeError, match="they must be the same"):
            WaveletPrior(Plain(), decoder_of_two(), tuple(wrong))
    with pytest.raises(CapabilityError, match="not a Gaussian"):
        gaussian_wavelet_prior(MixturePrior(torch.ones(1), torch.zeros(1, 4), torch.eye(4)[None]), decoder_of_two())
    with pytest.raises(ShapeError, match="has 64 values and the decoder gives 54"):
        gaussian_wavelet_prior(field(), decoder_of_two())


def test_states_as_rows_of_bands(unchecked):
    A = BandRows((1, 120), (44, 64), "bior2.4", scales=[0.5, 4.0])
    check_operator(A)
    check_operator(BandRows((2, 8, 9), (11, 6, 6), "haar", "symmetric"))
    x = rand(1, 1, 120)
    bands = WaveletTransform((1, 120), "bior2.4")(x)
    y = A(x)[0]
    assert y.shape == (2, 44, 64)
    torch.testing.assert_close(y[0, :, :60], 0.5 * bands[0, :1].expand(44, -1))
    torch.testing.assert_close(y[1, :, :60], 4.0 * bands[0, 1:].expand(44, -1))
    assert not y[:, :, 60:].any()
    with pytest.raises(ShapeError, match="do not fit a grid"):
        BandRows((1, 120), (64, 32), "bior2.4")
    with pytest.raises(ShapeError, match="2 bands, got 1 scales"):
        BandRows((1, 120), (44, 64), "bior2.4", scales=[1.0])


def test_solve_takes_it_as_any_prior():
    law = field()
    prior = gaussian_wavelet_prior(law, WaveletTransform((1, 8, 8), "db2"))
    problem = Problem.simulate(Blur(gaussian_kernel(3, 1.0), (1, 8, 8)), law.sample(1)[0], noise_std=0.05)
    solution = invdiff.solve(problem, prior, draws=8, seed=1)
    assert solution.draws.shape == (8, 1, 8, 8)
    assert solution.check()["verdict"] == "consistent"
