"""The benchmark on photographs: its tasks, its contenders, and the way from trials to a table."""

import json

import pytest
import torch

from invdiff import samplers
from invdiff.bench import contenders, imaging, tasks
from invdiff.bench.contenders import CONTENDERS, Contender, run, trial
from invdiff.bench.tasks import NOISE_STD, SEEDS, VALIDATION_SEED, group, task_operator
from invdiff.errors import CapabilityError, InputError
from invdiff.operators import Blur, Inpainting
from invdiff.operators.base import fingerprint
from invdiff.priors import FieldPrior
from invdiff.solve import sampler_classes

PRIOR = FieldPrior.power_law((3, 64, 64), exponent=3.0, std=0.2, mean=0.5)


def truths(n: int) -> torch.Tensor:
    return PRIOR.sample(n, seed=7).float()


# Tasks.


def test_the_settings_are_the_published_ones():
    assert NOISE_STD == 0.05
    for side, kernel in ((64, 15), (256, 61)):
        shaken = task_operator("motion-deblur", side, 0)
        assert isinstance(shaken, Blur)
        assert shaken.kernel.shape[-2:] == (kernel, kernel)
        assert shaken.boundary == "reflect"
        assert task_operator("gaussian-deblur", side, 0).kernel.shape[-2:] == (kernel, kernel)
        seen = task_operator("inpaint-random", side, 0)
        assert isinstance(seen, Inpainting)
        assert seen.out_shape == (3 * round(0.3 * side**2),)
        assert task_operator("inpaint-box", side, 0).out_shape == (3 * (side**2 - (side // 2) ** 2),)
        assert task_operator("super-resolution-x4", side, 0).out_shape == (3, side // 4, side // 4)
    with pytest.raises(InputError, match="28, 64 and 256"):
        task_operator("motion-deblur", 128, 0)


@pytest.mark.parametrize("task", ["motion-deblur", "inpaint-random", "inpaint-box"])
def test_eight_kernels_or_masks_each_serve_an_eighth_of_the_pictures(task):
    pictures = torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    groups = tasks.tests(task, pictures)
    assert [g.indices for g in groups] == [(s, s + 8) for s in range(SEEDS)]
    prints = {fingerprint(g.problems[0].likelihood.operator) for g in groups}
    assert len(prints) == SEEDS
    assert fingerprint(task_operator(task, 64, VALIDATION_SEED)) not in prints
    for g in groups:
        assert g.problems[0].likelihood.operator is g.problems[1].likelihood.operator
        assert torch.equal(g.problems[1].reference, pictures[g.indices[1]])


def test_the_measurement_follows_task_and_picture_alone():
    pictures = truths(3)
    whole = group("inpaint-random", pictures, [0, 1, 2], 0)
    part = group("inpaint-random", pictures, [2], 0)
    assert torch.equal(whole.problems[2].likelihood.measurement, part.problems[0].likelihood.measurement)


# Contenders.


def test_every_sampler_takes_part():
    made = {type(c.make(50, **trial(c, 0))) for c in CONTENDERS if c.make is not None}
    # 16 particles cannot carry weights on a picture, nor walkers come up again from where a picture has been measured.
    left_out = {samplers.ImportanceSampling, samplers.AFDPS, samplers.FPS, samplers.MCGDiff, samplers.PCN}
    left_out |= {samplers.TDS, samplers.FKSteering, samplers.DMCMC}
    # Which draw tokens:
    left_out |= {samplers.TwistedSMC, samplers.AnchoredSMC, samplers.AmortisedSMC, samplers.MaskedGibbs}
    left_out |= {samplers.APS, samplers.G2D2, samplers.SGDD, samplers.SVDD}
    left_out |= {samplers.WDNO}  # it steers; on linear problems it is DiffPIR
    assert made == set(sampler_classes().values()) - left_out
    assert {c.peer for c in CONTENDERS if c.library == "deepinv"} == {"DPS", "DDRM", "DiffPIR", "PosteriorDiffusion"}


@pytest.mark.parametrize("contender", [c for c in CONTENDERS if c.make], ids=lambda c: c.name)
def test_no_trial_has_more_evaluations_than_allowed(contender):
    for k in range(16):
        settings = trial(contender, k)
        for evaluations in (contenders.EVALUATIONS, 300):
            assert 0.9 * evaluations <= contender.make(evaluations, **settings).cost().forward <= evaluations
        assert settings == trial(contender, k)
    assert trial(contender, 0) == {}
    assert trial(contender, 1) != trial(contender, 2)


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: c.name)
def test_every_contender_runs_with_its_defaults_and_counts_its_passes(contender):
    batch = group("inpaint-random", truths(2), [0, 1], 0)
    result = run(contender, {}, batch, PRIOR, draws=2, device="cpu", precision="float32", compiled=False)
    assert result.draws.shape == (2, 2, 3, 64, 64)
    assert 0 < result.evaluations <= contenders.EVALUATIONS
    # Draws belong to their pictures: better off than with the other's.
    own, other = ((result.draws - t).square().mean() for t in (batch.truths[:, None], batch.truths.flip(0)[:, None]))
    assert float(own) < float(other)
    assert not torch.equal(result.draws[:, 0], result.draws[:, 1])


def test_a_contender_that_cannot_do_a_task_says_why():
    shaken = group("motion-deblur", truths(1), [0], 0)
    for name in ("DDRM", "deepinv DDRM"):
        contender = next(c for c in CONTENDERS if c.name == name)
        with pytest.raises(CapabilityError, match=r"(?i)svd"):
            run(contender, {}, shaken, PRIOR, draws=1, device="cpu", precision="float32", compiled=False)


# From trials to a table.


def test_tuning_testing_merging_and_the_table(tmp_path, monkeypatch):
    def pigdm(evaluations: int, sigma_min: float | None = None) -> samplers.Sampler:
        return samplers.PiGDM(
            steps=min(4, evaluations),
            covariance=samplers.Spectral(),
            levels=samplers.Levels(sigma_min=sigma_min, sigma_max=10.0),
        )

    few = (
        Contender(name="good", make=pigdm, ranges={"sigma_min": (0.01, 0.02)}),
        next(c for c in CONTENDERS if c.name == "DDRM"),
    )
    monkeypatch.setattr(imaging, "CONTENDERS", few)
    monkeypatch.setattr(imaging, "TASKS", {"motion-deblur": "motion deblurring"})
    monkeypatch.setattr(imaging, "load_prior", lambda name: PRIOR)
    monkeypatch.setattr(imaging, "pictures", lambda data, side, split, count: truths(count))
    settings, parts = tmp_path / "settings.json", [tmp_path / "0.json", tmp_path / "1.json"]
    common = ["--data", str(tmp_path), "--draws", "3"]
    imaging.main(["tune", *common, "--pictures", "2", "--trials", "3", "--out", str(settings)])
    tuned = json.loads(settings.read_text())
    good, unable = tuned["rows"]
    assert len(good["trials"]) == 3
    assert good["best"] == min(good["trials"], key=lambda t: t["crps"])["settings"]
    assert unable["best"] is None
    assert len(unable["trials"]) == 1
    claim = tmp_path / "claim"
    claim.mkdir()
    (claim / "motion-deblur DDRM").touch()
    test = ["test", *common, "--pictures", "9", "--settings", str(settings), "--claim", str(claim)]
    imaging.main([*test, "--out", str(parts[0])])
    (claim / "motion-deblur DDRM").unlink()
    imaging.main([*test, "--out", str(parts[1])])
    assert [[r["contender"] for r in json.loads(p.read_text())["rows"]] for p in parts] == [["good"], ["DDRM"]]
    out, table = tmp_path / "test.json", tmp_path / "table.md"
    imaging.main(["merge", "--out", str(out), "--parts", *map(str, parts)])
    report = json.loads(out.read_text())
    row, left_out = report["rows"]
    assert row["pictures"] == 9
    assert len(row["each_crps"]) == 9
    assert row["crps"][0] == pytest.approx(sum(row["each_crps"]) / 9, abs=1e-4)
    assert "svd" in left_out["failed"].lower()
    imaging.main(["table", "--out", str(out), "--table", str(table)])
    text = table.read_text()
    assert "9 pictures of 64 x 64" in text
    assert "| invdiff | good | 4 + 0 |" in text
    assert f"**{row['psnr_mean'][0]:.2f}" in text
    assert "Left out: DDRM (invdiff). " in text
    # Processes that share a machine time nothing; a run of its own does.
    assert "| s a picture |" not in text
    times = tmp_path / "times.json"
    imaging.main(
        ["time", *common, "--pictures", "2", "--repeats", "2", "--settings", str(settings), "--out", str(times)]
    )
    timed = json.loads(times.read_text())
    first = timed["rows"][0]
    assert first["over_network"] == pytest.approx(
        first["seconds_per_picture"] * 2 / (first["evaluations"] * timed["network_seconds"]), rel=0.05
    )
    imaging.main(["table", "--out", str(out), "--table", str(table), "--times", str(times)])
    assert "| s a picture | x network |" in table.read_text()
    assert f"| 4 + 0 | {first['seconds_per_picture']:.2f} | {first['over_network']:.2f} |" in table.read_text()
