"""Solutions: summaries, checks and scores, and files that come back bit by bit and that ArviZ reads."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

import invdiff
from invdiff import likelihoods, operators, samplers
from invdiff.draws import Draws
from invdiff.driver import Info
from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.event import Variable
from invdiff.posterior import Posterior
from invdiff.priors import GaussianPrior
from invdiff.problem import Problem
from invdiff.solution import Solution

F64 = torch.float64
SHAPE = (1, 2, 3)

EVENT = (
    Variable(name="state", dims=("x",), shape=(4,), units="m s-1", coords={"x": (0.0, 0.25, 0.5, 0.75)}),
    Variable(name="forcing", dims=("t", "x"), shape=(2, 3), units="N", coords={"x": (0.125, 0.375, 0.625)}),
    Variable(name="winds", dims=("level", "t"), shape=(2, 2), units="K", coords={"level": ("low", "high")}),
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def problem(noise_std: float = 0.5, seed: int = 0) -> Problem:
    truth = normal(*SHAPE, seed=seed)
    return Problem.simulate(operators.Scale(SHAPE, 2.0), truth, noise_std=noise_std, seed=seed, card={"version": 3})


def prior() -> GaussianPrior:
    return GaussianPrior(torch.zeros(SHAPE), torch.eye(6), sigma_min=0.01, sigma_max=30.0)


def solve(sampler=None, **settings) -> Solution:
    settings = {"draws": 6, "chains": 2, "seed": 3, **settings}
    return invdiff.solve(problem(), prior(), sampler or samplers.PiGDM(steps=5), **settings)


def made(draws: Tensor, **settings) -> Solution:
    """A solution of given draws (chain, draw, *SHAPE)."""
    event = (Variable(name="image", dims=("channel", "y", "x"), shape=tuple(draws.shape[2:])),)
    return Solution(event=event, by_chain={"image": draws}, deviance=torch.ones(draws.shape[:2]), **settings)


def several(weights: Tensor | None = None, dtype: torch.dtype = F64) -> Solution:
    """A solution of an event of several variables, on grids of their own."""

    def split(x: Tensor) -> dict[str, Tensor]:
        parts = x.split([v.size for v in EVENT], dim=-1)
        return {v.name: p.reshape(*x.shape[:-1], *v.shape) for v, p in zip(EVENT, parts, strict=True)}

    likelihood = likelihoods.Gaussian(operators.Scale((14,)), normal(14, seed=1).to(dtype), 0.5)
    evidence = None if weights is None else torch.tensor([-3.0, -2.5], dtype=F64)
    draws = Draws(z=normal(2, 5, 14).to(dtype), log_weights=weights, log_evidence=evidence, is_chain=weights is None)
    return Solution.from_draws(
        draws,
        slice(0, 2),
        decode=lambda z: z,
        split=split,
        event=EVENT,
        likelihood=likelihood,
        trace=(Info(sigma=2.0, misfit=1.5), Info(sigma=0.0, ess=0.25, evaluations=2.0)),
        about={"problem": "several", "measurements": 14},
        seed=7,
    )


# Summaries.


def test_moments_and_quantiles_are_those_of_all_chains():
    draws = normal(2, 50, *SHAPE)
    s, flat = made(draws), draws.flatten(0, 1).numpy()
    np.testing.assert_array_equal(s.draws.numpy(), flat)
    np.testing.assert_allclose(s.mean().numpy(), flat.mean(0), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(s.std().numpy(), flat.std(0, ddof=1), rtol=1e-13)
    for q in (0.05, 0.5, 0.9):
        np.testing.assert_allclose(s.quantile(q).numpy(), np.quantile(flat, q, axis=0, method="weibull"), rtol=1e-12)
    low, high = s.interval(0.8)
    np.testing.assert_allclose(low.numpy(), np.quantile(flat, 0.1, axis=0, method="weibull"), rtol=1e-12)
    assert bool((low < high).all())
    np.testing.assert_allclose(high.numpy(), np.quantile(flat, 0.9, axis=0, method="weibull"), rtol=1e-12)


def test_an_interval_needs_draws_enough():
    made(normal(1, 19, *SHAPE)).interval(0.9)
    with pytest.raises(InputError, match="draws"):
        made(normal(1, 18, *SHAPE)).interval(0.9)


def test_a_single_draw_has_no_spread():
    assert bool(made(normal(1, 1, *SHAPE)).std().isnan().all())


def test_log_evidence_is_of_the_mean_evidence():
    s = made(normal(3, 2, *SHAPE), chain_log_evidence=torch.tensor([-1000.0, -1001.0, -999.5], dtype=F64))
    ratios = np.exp([0.0, -1.0, 0.5])
    assert math.isclose(s.log_evidence, -1000.0 + math.log(ratios.mean()), rel_tol=1e-14)
    assert math.isclose(s.log_evidence_se, ratios.std(ddof=1) / ratios.mean() / math.sqrt(3), rel_tol=1e-12)
    assert "-999.99" in repr(s) or f"{s.log_evidence:.2f}" in repr(s)
    alone = made(normal(1, 2, *SHAPE), chain_log_evidence=torch.tensor([-2.0], dtype=F64))
    assert (alone.log_evidence, alone.log_evidence_se) == (-2.0, None)
    assert made(normal(1, 2, *SHAPE)).log_evidence is None


def test_weighted_draws_are_resampled_within_their_chain():
    weights = torch.tensor([[0.0, 3.0, -50.0, 1.0, 2.0], [-90.0, -90.0, -90.0, 0.0, -90.0]], dtype=F64)
    s = several(weights)
    assert s.ancestors.shape == (2, 5)
    assert s.ancestors[1].tolist() == [3] * 5
    assert 2 not in s.ancestors[0].tolist()
    for v in EVENT:
        expected = torch.stack([s.particles[v.name][i][s.ancestors[i]] for i in range(2)])
        assert torch.equal(s.by_chain[v.name], expected)
        assert s.particles[v.name].shape == (2, 5, *v.shape)
    joined = torch.cat([s.draws[v.name].flatten(1) for v in EVENT], dim=1)
    torch.testing.assert_close(s.deviance.flatten(), s.likelihood.deviance(joined))
    assert torch.equal(several(weights).ancestors, s.ancestors)


def test_predictions_are_what_the_operator_makes():
    s = solve()
    torch.testing.assert_close(s.predict(), 2.0 * s.draws)
    torch.testing.assert_close(several().predict()[:, :4], several().draws["state"])
    objective = made(normal(1, 2, *SHAPE), likelihood=likelihoods.Objective(lambda x: x.flatten(1).sum(1), 1.0, SHAPE))
    for without in (objective, made(normal(1, 2, *SHAPE))):
        with pytest.raises(CapabilityError, match="cannot predict"):
            without.predict()


@pytest.mark.parametrize(("ratio", "verdict"), [(1.0, "consistent"), (4.0, "misfit"), (1e-3, "overfit")])
def test_check_compares_residuals_with_the_noise(ratio, verdict):
    s = made(normal(2, 3, *SHAPE), about={"measurements": 200})
    object.__setattr__(s, "deviance", torch.full((2, 3), 200.0 * ratio))
    report = s.check()
    assert math.isclose(report["reduced_chi_square"], ratio, rel_tol=1e-6)
    assert math.isclose(report["expected_spread"], 0.1)
    assert report["verdict"] == verdict
    with pytest.raises(CapabilityError, match="number of measured values"):
        made(normal(1, 2, *SHAPE)).check()


def test_check_sees_a_wrong_noise_level():
    operator = operators.Scale((1, 12, 12))
    y = operator(normal(1, 1, 12, 12))[0] * 1.2
    wide = GaussianPrior(torch.zeros(1, 12, 12), 1e-4 * torch.eye(144), sigma_min=1e-3, sigma_max=1.0)
    wrong = invdiff.solve(Problem(likelihoods.Gaussian(operator, y, 0.1)), wide, samplers.PiGDM(steps=5))
    assert wrong.check()["verdict"] == "misfit"
    right = invdiff.solve(Problem(likelihoods.Gaussian(operator, y, 1.2)), wide, samplers.PiGDM(steps=5))
    assert right.check()["verdict"] == "consistent"


def test_scores_need_a_truth():
    s = solve(draws=20)
    assert s.score() == pytest.approx(s.score(problem().reference), rel=1e-12)
    assert s.score()["crps"] < s.score(problem().reference + 5.0)["crps"]
    with pytest.raises(InputError, match=r"solution\.score\(truth\)"):
        made(normal(1, 4, *SHAPE)).score()
    with pytest.raises(ShapeError, match=r"\(1, 2, 3\); got"):
        s.score(problem().reference[0])


def test_scores_of_several_variables_carry_their_names():
    truth = {v.name: torch.zeros(v.shape, dtype=F64) for v in EVENT}
    scores = several().score(truth)
    assert {k.split("/")[0] for k in scores} == {v.name for v in EVENT}
    flat = several().with_reference(torch.zeros(14, dtype=F64))
    assert flat.score() == pytest.approx(scores, rel=1e-12, nan_ok=True)
    with pytest.raises(ShapeError, match=r"\['state', 'forcing', 'winds'\].*14 values"):
        several().with_reference(torch.zeros(13, dtype=F64))
    with pytest.raises(ShapeError, match="'winds'"):
        several().score({"state": truth["state"], "forcing": truth["forcing"]})


def test_provenance_says_all_that_made_the_draws():
    about = solve().about
    assert about["problem"] == "simulated"
    assert about["problem_card"] == {"version": 3}
    assert about["problem_key"] == problem().key
    assert about["prior_key"] == prior().key
    assert about["prior"] == "gaussian"
    assert about["sampler"] == "PiGDM"
    assert about["sampler_settings"] == repr(samplers.PiGDM(steps=5))
    assert about["sampler_reason"] == "given"
    assert (about["draws"], about["chains"], about["seed"]) == (6, 2, 3)
    assert (about["device"], about["dtype"], about["precision"]) == ("cpu", "float32", "float32")
    assert about["invdiff_version"] == invdiff.__version__
    assert about["torch_version"] == str(torch.__version__)
    assert about["evaluations_per_draw"] == 5.0
    assert about["measurements"] == 6
    assert about["seconds"] > 0.0
    assert about["stopped"] == ""
    assert "song2023pigdm" in about["citation"] == solve().cite()
    assert len(solve().trace) == 5
    chosen = invdiff.solve(problem(), prior(), draws=2).about
    assert "error covariance" in chosen["sampler_reason"]


# Files.


def same(a: Solution, b: Solution) -> None:
    """Everything that a file keeps is equal, to the bit and the dtype."""

    def tensors(s: Solution) -> dict[str, Tensor]:
        found = {f"draws/{k}": v for k, v in s.by_chain.items()}
        found |= {f"particles/{k}": v for k, v in (s.particles or {}).items()}
        found |= {f"reference/{k}": v for k, v in (s.reference or {}).items()}
        names = ("log_weights", "ancestors", "chain_log_evidence", "deviance", "measurement")
        return found | {n: getattr(s, n) for n in names if getattr(s, n) is not None}

    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        assert t.dtype == theirs[name].dtype, name
        assert t.shape == theirs[name].shape, name
        assert t.numpy().tobytes() == theirs[name].numpy().tobytes(), name
    assert a.event == b.event
    assert a.is_chain == b.is_chain
    assert tuple(a.trace) == tuple(b.trace)
    assert dict(a.about) == dict(b.about)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("sampler", [samplers.PiGDM(steps=4), samplers.ImportanceSampling(steps=4)])
def test_a_file_keeps_everything(tmp_path, dtype, sampler):
    s = solve(sampler, dtype=dtype)
    assert s.draws.dtype == dtype
    assert (s.log_weights is None) == isinstance(sampler, samplers.PiGDM)
    path = s.save(tmp_path / "out.nc")
    back = Solution.load(path)
    same(s, back)
    assert back.log_evidence == s.log_evidence
    assert back.check() == s.check()
    assert back.score() == pytest.approx(s.score(), rel=1e-12, nan_ok=True)
    assert repr(back) == repr(s)
    same(s, Solution.load(back.save(tmp_path / "again.nc")))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.nc", "out.nc"]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("weighted", [True, False])
def test_several_variables_keep_their_grids_and_units(tmp_path, weighted, dtype):
    weights = normal(2, 5, seed=3) if weighted else None
    s = several(weights, dtype).with_reference(normal(14, seed=4).to(dtype))
    back = Solution.load(s.save(tmp_path / "out.nc"))
    same(s, back)
    posterior = s.data["posterior"]
    assert {v: posterior[v].attrs["units"] for v in posterior.data_vars} == {v.name: v.units for v in EVENT}
    assert posterior["state"].dims == ("chain", "draw", "state_x")
    assert posterior["state_x"].values.tolist() == [0.0, 0.25, 0.5, 0.75]
    assert posterior["forcing_x"].values.tolist() == [0.125, 0.375, 0.625]
    assert posterior["winds"].dims == ("chain", "draw", "level", "t")
    assert posterior["level"].values.tolist() == ["low", "high"]


def test_non_finite_values_and_complex_measurements_survive(tmp_path):
    draws = normal(1, 3, *SHAPE)
    draws[0, 0, 0, 0] = torch.tensor([torch.nan, torch.inf, -0.0])
    y = torch.complex(normal(2, 2), normal(2, 2, seed=1))
    s = made(draws, measurement=y)
    same(s, Solution.load(s.save(tmp_path / "out.nc")))


def test_the_tree_has_arviz_groups():
    tree = solve(samplers.ImportanceSampling(steps=4)).data
    assert set(tree.children) == {"posterior", "sample_stats", "particles", "trace", "observed_data", "constant_data"}
    assert tree["posterior"]["image"].dims == ("chain", "draw", "channel", "y", "x")
    assert tree["particles"]["log_weight"].dims == ("chain", "particle")
    assert set(tree["sample_stats"].data_vars) == {"deviance", "ancestor", "log_evidence"}
    assert tree["observed_data"]["measurement"].dims == ("channel", "y", "x")
    assert tree["trace"]["sigma"].values[-1] == 0.0
    assert tree["trace"]["step"].values.tolist() == [1, 2, 3, 4]
    assert json.loads(tree.attrs["problem_card"]) == {"version": 3}


def test_arviz_reads_the_file(tmp_path):
    import arviz_base
    import arviz_stats

    path = solve(draws=40).save(tmp_path / "out.nc")
    data = arviz_base.convert_to_datatree(str(path))
    summary = arviz_stats.summary(data, kind="stats", round_to="none")
    mean = Solution.load(path).mean().flatten().numpy()
    assert len(summary) == 6
    np.testing.assert_allclose(summary["mean"].to_numpy(dtype=float), mean, rtol=1e-5, atol=1e-6)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path, s = tmp_path / "out.nc", solve()
    s.save(path)
    before = path.read_bytes()

    def fail(self, target, **settings):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(xr.DataTree, "to_netcdf", fail)
    with pytest.raises(InputError, match=r"Cannot write .*out\.nc: No space left"):
        s.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.nc"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for parent in ("missing", "file"):
        with pytest.raises(InputError, match=f"Cannot write .*{parent}"):
            solve().save(tmp_path / parent / "out.nc")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_files_follow_the_umask(tmp_path):
    (tmp_path / "plain").write_text("")
    path = solve().save(tmp_path / "out.nc")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty", "cut", "foreign", "other-tree"])
def test_what_is_no_solution_is_refused(tmp_path, kind):
    path = tmp_path / "in.nc"
    if kind == "folder":
        path.mkdir()
    elif kind in ("text", "empty"):
        path.write_text("a,b\n1,2\n" if kind == "text" else "")
    elif kind == "cut":
        content = solve().save(path).read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif kind == "foreign":
        xr.Dataset({"t2m": ("x", np.arange(3.0))}).to_netcdf(path, engine="h5netcdf")
    elif kind == "other-tree":
        tree = xr.DataTree.from_dict({"/posterior": xr.Dataset({"mu": (("chain", "draw"), np.zeros((1, 2)))})})
        tree.attrs["event"] = "a party"
        tree.to_netcdf(path, engine="h5netcdf")
    with pytest.raises(InputError, match=r"in\.nc"):
        Solution.load(path)


def test_variables_that_files_cannot_hold_are_refused_before_the_run():
    for dims in (("u",), ("chain",), ("x", "x")):
        with pytest.raises(InputError, match="must differ"):
            Variable(name="u", dims=dims, shape=(2,) * len(dims))
    with pytest.raises(ShapeError, match="one name an axis"):
        Variable(name="u", dims=("x",), shape=(2, 2))
    with pytest.raises(ShapeError, match="3 coordinates along 'x'"):
        Variable(name="u", dims=("x",), shape=(2,), coords={"x": (0.0, 1.0, 2.0)})
    with pytest.raises(ShapeError, match="'y', which is not among"):
        Variable(name="u", dims=("x",), shape=(2,), coords={"y": (0.0, 1.0)})


def test_a_posterior_of_several_problems_gives_a_solution_for_each():
    problems = [problem(seed=s) for s in (1, 2)]
    assert len(Posterior(problems, prior()).sample(samplers.PiGDM(steps=3), 2)) == 2
    solutions = invdiff.solve(problems, prior(), samplers.PiGDM(steps=3), draws=2)
    for p, s in zip(problems, solutions, strict=True):
        assert torch.equal(s.reference["image"], p.reference)
        assert s.about["problem_key"] == p.key
    one_by_one = invdiff.solve(problems, prior(), samplers.PiGDM(steps=3), draws=2, together=1)
    torch.testing.assert_close(one_by_one[1].draws, solutions[1].draws)
