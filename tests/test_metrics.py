"""Scores: against other libraries, brute force and exact laws, with bounds from the sample size."""

from math import isnan, log10, nan, sqrt

import numpy as np
import pytest
import torch

from invdiff import InputError, ShapeError, metrics

SCORES = {"psnr_mean", "psnr_draw", "ssim_mean", "crps", "coverage_90", "spread_skill"}


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def brute_crps(draws, truth, fair):
    n = len(draws)
    pairs = sum(abs(draws[i] - draws[j]) for i in range(n) for j in range(n))
    return float((sum(abs(x - truth) for x in draws) / n - pairs / (2 * n * (n - 1 if fair else n))).mean())


@pytest.mark.parametrize("fair", [True, False])
@pytest.mark.parametrize("n", [2, 3, 12])
def test_crps_against_brute_force_and_scoringrules(n, fair):
    scoringrules = pytest.importorskip("scoringrules")
    draws, truth = normal(n, n, 2, 5), normal(99, 2, 5)
    draws[1, 0] = draws[0, 0]  # ties
    ours = metrics.crps(draws, truth, fair=fair)
    assert ours == pytest.approx(brute_crps(draws, truth, fair), rel=1e-12)
    estimator = "fair" if fair else "nrg"
    theirs = scoringrules.crps_ensemble(truth.numpy(), draws.numpy(), m_axis=0, estimator=estimator, backend="numpy")
    assert ours == pytest.approx(float(theirs.mean()), rel=1e-12)


def test_crps_of_exact_draws():
    # E of the fair score of N(0, 1) draws against an N(0, 1) truth: E|x - t| / 2 = 1 / sqrt(pi) for every n.
    values = 100_000
    for n in (2, 20):
        score = metrics.crps(normal(1, n, values), normal(2, values))
        assert score == pytest.approx(1 / sqrt(torch.pi), abs=6 / sqrt(values))  # a value's score varies by less than 1
    assert metrics.crps(normal(1, 1, 7), normal(2, 7)) == pytest.approx(
        float((normal(1, 1, 7) - normal(2, 7)).abs().mean())
    )


def test_scores_keep_their_digits_far_from_zero():
    """Temperatures in kelvin as float32: the scores see the draws' spread, not the offset's rounding."""
    draws = (280.0 + normal(3, 40, 300)).float()
    truth = (280.0 + normal(4, 300)).float()
    exact = draws.double(), truth.double()
    assert metrics.crps(draws, truth) == pytest.approx(brute_crps(*exact, True), rel=1e-9)
    assert metrics.energy_score(draws, truth) == pytest.approx(brute_energy(*exact), rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 19, 32])
def test_quantile_is_numpys_weibull(n):
    draws = normal(n, n, 3, 4)
    for q in np.linspace(1 / (n + 1), n / (n + 1), 9):
        expected = np.quantile(draws.numpy(), q, axis=0, method="weibull")
        torch.testing.assert_close(metrics.quantile(draws, float(q)), torch.from_numpy(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [19, 39, 99])
def test_interval_covers_as_it_says(n):
    # The truth's rank is uniform on 0 to n: the interval misses the first and last 0.05 (n + 1) of n + 1 exactly.
    values = 40_000
    share = metrics.coverage(normal(n, n, values), normal(0, values))
    assert abs(share - 0.9) < 4.5 * sqrt(0.9 * 0.1 / values)


def test_interval_at_32_draws_beats_the_usual_positions():
    values, n = 40_000, 32
    draws, truth = normal(5, n, values), normal(6, values)
    # Interpolated between the first two of 32 normal draws the interval holds 0.908 (Monte Carlo, a million sets).
    assert abs(metrics.coverage(draws, truth) - 0.908) < 4.5 * sqrt(0.9 * 0.1 / values)
    low, high = np.quantile(draws.numpy(), [0.05, 0.95], axis=0)
    usual = float(((truth.numpy() >= low) & (truth.numpy() <= high)).mean())
    assert usual < 0.87


@pytest.mark.parametrize(("level", "needed"), [(0.9, 19), (0.95, 39), (0.5, 3), (0.86, 14)])
def test_interval_says_how_many_draws_it_needs(level, needed):
    low, high = metrics.interval(normal(1, needed, 3), level)
    assert bool((low < high).all())
    with pytest.raises(InputError, match=rf"{needed - 1} draws.*at least {needed} draws"):
        metrics.interval(normal(1, needed - 1, 3), level)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 1.5, nan])
def test_interval_refuses_what_is_no_level(level):
    with pytest.raises(InputError, match="between 0 and 1"):
        metrics.interval(normal(1, 50, 3), level)


@pytest.mark.parametrize("q", [0.0, 1.0, -1.0, 2.0, nan])
def test_quantile_refuses_what_is_no_quantile(q):
    with pytest.raises(InputError, match="0 < q < 1"):
        metrics.quantile(normal(1, 50, 3), q)


@pytest.mark.parametrize("shape", [(3, 32, 45), (1, 11, 11), (1, 11, 30), (2, 64, 64)])
def test_ssim_is_skimages(shape):
    from skimage.metrics import structural_similarity

    truth = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    # A defect at the border alone, and noise everywhere: the border's treatment shows.
    x = (truth + 0.2 * normal(2, *shape, dtype=torch.float32)).clamp(0, 1)
    x[:, :2] = 1 - x[:, :2]
    for span in (1.0, 255.0):
        theirs = structural_similarity(
            (truth * span).double().numpy(),
            (x * span).double().numpy(),
            data_range=span,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=0,
        )
        assert metrics.ssim(x * span, truth * span, span) == pytest.approx(float(theirs), abs=1e-6)
    assert metrics.ssim(truth, truth) == 1.0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("a", "b"), [((3, 10, 20), (3, 10, 20)), ((20, 20), (20, 20)), ((3, 20, 20), (1, 20, 20))])
def test_ssim_refuses(a, b):
    with pytest.raises(ShapeError, match="at least 11"):
        metrics.ssim(torch.zeros(a), torch.zeros(b))


def test_psnr():
    truth = torch.zeros(3, 4, 4)
    assert metrics.psnr(truth + 0.1, truth) == pytest.approx(20.0, abs=1e-5)
    assert metrics.psnr(truth + 2.0, truth, 255.0) == pytest.approx(20 * log10(255 / 2))
    assert metrics.psnr(truth + 2.0, truth) == pytest.approx(-20 * log10(2))  # not clipped
    assert metrics.psnr(truth, truth) == float("inf")
    assert isnan(metrics.psnr(truth + nan, truth))
    assert metrics.psnr(truth + float("inf"), truth) == float("-inf")


def test_spread_skill_of_exact_draws_is_one_and_tells_too_narrow_ones():
    for n in (2, 8, 32):
        values = 20_000
        draws, truth = normal(n, n, values), normal(100, values)
        # log ratio = (log spread^2 - log error^2) / 2, with relative variances 2 / (values (n - 1)) and 2 / values.
        bound = 5 * sqrt(0.5 / values * (1 + 1 / (n - 1)))
        assert metrics.spread_skill(draws, truth) == pytest.approx(1.0, abs=bound)
        # Half the spread about the same centre: error^2 = 1 + 1/(4 n) in place of 1 + 1/n.
        narrow = 0.5 * sqrt((1 + 1 / n) / (1 + 0.25 / n))
        assert metrics.spread_skill(0.5 * draws, truth) == pytest.approx(narrow, abs=bound)
    assert isnan(metrics.spread_skill(normal(1, 1, 5), normal(2, 5)))


def chi_square(counts):
    expected = counts.sum() / len(counts)
    return float((counts - expected).square().sum() / expected)


def test_rank_histogram_is_flat_where_calibrated_and_skewed_where_biased():
    n, values = 9, 20_000
    draws, truth = normal(7, n, values), normal(8, values)
    counts = metrics.rank_histogram(draws, truth)
    assert counts.shape == (n + 1,) and int(counts.sum()) == values
    assert chi_square(counts) < 33.7  # the 0.9999 quantile of chi-square with 9 degrees of freedom
    high = metrics.rank_histogram(draws, truth + 0.5)
    assert chi_square(high) > 1000 and int(high[-1]) > 2 * int(high[0])
    under = metrics.rank_histogram(0.5 * draws, truth)  # too narrow: U-shaped
    assert min(int(under[0]), int(under[-1])) > 3 * int(under[n // 2])


def test_rank_histogram_places_ties_evenly_by_seed():
    n, values = 4, 20_000
    counts = metrics.rank_histogram(torch.zeros(n, values), torch.zeros(values))
    assert chi_square(counts) < 23.5  # the 0.9999 quantile with 4 degrees of freedom
    assert torch.equal(counts, metrics.rank_histogram(torch.zeros(n, values), torch.zeros(values)))
    assert not torch.equal(counts, metrics.rank_histogram(torch.zeros(n, values), torch.zeros(values), seed=1))
    exact = metrics.rank_histogram(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([1.5]))
    assert exact.tolist() == [0, 0, 1, 0]


def brute_energy(draws, truth):
    n = len(draws)
    pairs = sum(float((draws[i] - draws[j]).norm()) for i in range(n) for j in range(n))
    return sum(float((x - truth).norm()) for x in draws) / n - (0.5 * pairs / (n * (n - 1)) if n > 1 else 0.0)


@pytest.mark.parametrize("n", [1, 2, 7, 30])  # above 25, cdist would take matrix products
def test_energy_score_against_brute_force(n):
    draws, truth = normal(n, n, 2, 3, 4), normal(50, 2, 3, 4)
    assert metrics.energy_score(draws, truth) == pytest.approx(brute_energy(draws, truth), rel=1e-12)


def test_energy_score_of_one_value_is_the_crps():
    draws, truth = normal(1, 11, 1), normal(2, 1)
    assert metrics.energy_score(draws, truth) == pytest.approx(metrics.crps(draws, truth), rel=1e-12)


def test_sliced_wasserstein_of_shifted_sets():
    a, shift = normal(1, 40, 2, 3), normal(2, 2, 3)
    d, projections = 6, 4096
    # (u . s)^2 |s|^-2 for a random unit u is Beta(1/2, (d - 1)/2): mean 1/d, variance 2 (d - 1) / (d^2 (d + 2)).
    relative = sqrt(2 * (d - 1) / (d + 2) / projections)
    distance = metrics.sliced_wasserstein(a, a + shift, projections=projections)
    assert distance**2 == pytest.approx(float(shift.square().sum()) / d, rel=5 * relative)
    mixed = a[torch.randperm(40, generator=torch.Generator().manual_seed(3))]
    assert metrics.sliced_wasserstein(a, mixed) < 1e-12
    assert metrics.sliced_wasserstein(a, 3 * a) > 0.5
    assert metrics.sliced_wasserstein(a, a + shift, seed=1) != metrics.sliced_wasserstein(a, a + shift, seed=2)


@pytest.mark.usefixtures("unchecked")
def test_sliced_wasserstein_refuses_sets_of_two_shapes():
    with pytest.raises(ShapeError, match=r"\(4, 3\) and \(5, 3\)"):
        metrics.sliced_wasserstein(torch.zeros(4, 3), torch.zeros(5, 3))


def test_score_has_all_keys_and_says_nan_where_draws_are_too_few():
    truth = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))
    draws = truth + 0.1 * normal(2, 19, 3, 16, 16, dtype=torch.float32)
    full = metrics.score(draws, truth)
    assert set(full) == SCORES and not any(map(isnan, full.values()))
    assert full["psnr_mean"] == metrics.psnr(draws.mean(0), truth) > full["psnr_draw"]
    assert full["psnr_draw"] == pytest.approx(20.0, abs=0.1) and full["ssim_mean"] == metrics.ssim(draws.mean(0), truth)
    few = metrics.score(draws[:18], truth)
    assert {name for name, value in few.items() if isnan(value)} == {"coverage_90"}
    one = metrics.score(draws[:1], truth)
    assert {name for name, value in one.items() if isnan(value)} == {"coverage_90", "spread_skill"}
    assert one["psnr_mean"] == pytest.approx(one["psnr_draw"])
    assert set(metrics.score(normal(1, 20, 30), normal(2, 30))) == SCORES - {"ssim_mean"}
    assert set(metrics.score(normal(1, 20, 3, 8, 40), normal(2, 3, 8, 40))) == SCORES - {"ssim_mean"}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["score", "crps", "coverage", "spread_skill", "energy_score", "rank_histogram"])
@pytest.mark.parametrize("draws", [(20, 1, 5), (20, 3), (0, 3, 5), (20, 3, 5, 1)])
def test_scores_refuse_draws_that_do_not_fit_the_truth(name, draws):
    with pytest.raises(ShapeError, match=r"\(3, 5\)"):
        getattr(metrics, name)(torch.zeros(draws), torch.zeros(3, 5))
