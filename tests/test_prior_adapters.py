"""Networks in every parametrisation become one denoiser: checked with networks that are exact for a Gaussian."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from invdiff.diagnostics.prior_checks import check_prior
from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.priors.adapters import (
    EDM,
    AdaptedPrior,
    Denoised,
    NoiseSchedule,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
    from_diffusers,
)

SHAPE = (2, 2, 3)
SIZE = 12
DDPM = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


_L = 0.3 * rand(SIZE, SIZE, seed=1)
MEAN, COVARIANCE = 0.3 * rand(SIZE, seed=2), _L @ _L.T + 0.01 * torch.eye(SIZE, dtype=torch.float64)


def posterior_mean(x: Tensor, alpha: Tensor, beta: Tensor, mean: Tensor = MEAN) -> Tensor:
    """E[x_0 | alpha x_0 + beta eps = x] for x_0 ~ N(mean, COVARIANCE), in float64."""
    a, b = alpha.double()[:, None], beta.double()[:, None]
    total = (a * a)[:, :, None] * COVARIANCE + (b * b)[:, :, None] * torch.eye(SIZE, dtype=torch.float64)
    residual = x.double().flatten(1) - a * mean
    return (mean + a * (torch.linalg.solve(total, residual[:, :, None])[:, :, 0] @ COVARIANCE)).reshape(x.shape)


def exact(z: Tensor, sigma: Tensor, mean: Tensor = MEAN) -> Tensor:
    return posterior_mean(z, torch.ones_like(sigma), sigma, mean)


class Exact(nn.Module):
    """The exact prediction for the Gaussian, from the definition of each; alpha and beta at (fractional) times."""

    def __init__(self, predicts: str, abar: np.ndarray | None = None, mean: Tensor = MEAN) -> None:
        super().__init__()
        self.predicts, self.mean = predicts, mean
        self.log_sigma = None if abar is None else 0.5 * np.log((1 - abar) / abar)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        t = time.double()
        if self.log_sigma is not None:  # variance preserving, at the noise level that the time stands for
            sigma = torch.from_numpy(np.exp(np.interp(t.numpy(), np.arange(len(self.log_sigma)), self.log_sigma)))
            alpha = (1 + sigma**2).rsqrt()
            beta = sigma * alpha
        elif self.predicts == "flow":
            alpha, beta = 1 - t, t
        elif self.predicts == "edm":
            sigma = torch.exp(4 * t)
            x = x.double() * (sigma**2 + 0.25).sqrt().reshape(-1, 1, 1, 1)
            alpha, beta = torch.ones_like(t), sigma
        else:
            alpha, beta = torch.ones_like(t), t if self.predicts == "denoised" else 2 * t.exp()
        clean = posterior_mean(x, alpha, beta, self.mean)
        a, b = alpha.reshape(-1, 1, 1, 1), beta.reshape(-1, 1, 1, 1)
        eps = (x.double() - a * clean) / b
        out = {
            "epsilon": lambda: eps,
            "v_prediction": lambda: a * eps - b * clean,
            "sample": lambda: clean,
            "denoised": lambda: clean,
            "score": lambda: -eps / b,
            "flow": lambda: eps - clean,
            "ve": lambda: -eps,
            "edm": lambda: (clean - 0.25 / (b**2 + 0.25) * x) / (0.5 * b / (b**2 + 0.25).sqrt()),
        }[self.predicts]()
        return out.to(time.dtype if time.is_floating_point() else torch.float64)


ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def prior_of(kind: str) -> AdaptedPrior:
    if kind in ("epsilon", "v_prediction", "sample", "score"):
        parametrisation = VariancePreserving(predicts=kind, schedule=NoiseSchedule.linear())
        return AdaptedPrior(Exact(kind, ABAR), SHAPE, parametrisation)
    if kind == "denoised":
        return AdaptedPrior(Exact(kind), SHAPE, Denoised(), sigma_min=0.01, sigma_max=100.0)
    parametrisation = {"edm": EDM(), "ve": VarianceExploding(), "flow": RectifiedFlow()}[kind]
    return AdaptedPrior(Exact(kind), SHAPE, parametrisation)


KINDS = ("epsilon", "v_prediction", "sample", "score", "edm", "ve", "flow", "denoised")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_denoiser_is_exact_between_the_steps_too(kind, dtype, tolerance):
    prior = prior_of(kind)
    sigma = torch.logspace(np.log10(prior.sigma_min), np.log10(prior.sigma_max), 61, dtype=torch.float64)
    sigma = sigma.clamp(prior.sigma_min, prior.sigma_max).to(dtype)
    clean = MEAN + rand(61, SIZE, seed=3) @ torch.linalg.cholesky(COVARIANCE).T
    z = (clean.reshape(61, *SHAPE) + sigma.double().reshape(-1, 1, 1, 1) * rand(61, *SHAPE, seed=4)).to(dtype)
    D = prior.denoise(z, sigma)
    scale = z.double().flatten(1).square().mean(1).sqrt().reshape(-1, 1, 1, 1)
    assert D.dtype == dtype
    assert float(((D - exact(z, sigma)).abs() / scale).max()) < tolerance
    one = prior.denoise(z[:1], float(sigma[0]))
    # A batch of one takes other products than one of 61, whose sums are rounded in another order.
    assert float((one - D[:1]).abs().max()) <= 64 * torch.finfo(dtype).eps * float(scale[0])


def test_an_adapted_prior_keeps_the_contract():
    report = check_prior(prior_of("epsilon"), n=24, levels=2, dtype=torch.float64)
    assert report.round_trip is not None and report.round_trip < 1e-12
    assert all(abs(level.tweedie_z) < 5 and level.asymmetry < 1 for level in report.levels)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_exact_denoiser(kind):
    prior = prior_of(kind)
    z = rand(3, *SHAPE, seed=5).requires_grad_()
    sigma = torch.tensor([0.0213, 0.7, 31.0], dtype=torch.float64)
    u = rand(3, *SHAPE, seed=6)
    ours = torch.autograd.grad(prior.denoise(z, sigma), z, u)[0]
    theirs = torch.autograd.grad(exact(z, sigma), z, u)[0]
    assert float((ours - theirs).abs().max()) < 1e-9


def test_draws_have_the_gaussians_moments():
    prior = prior_of("v_prediction")
    n = 400
    z = prior.sample(n, seed=0, steps=40)
    assert torch.allclose(prior.sample(3, seed=0, steps=40, batch=2), z[:3], atol=1e-4)  # whatever n and the batch
    variance = COVARIANCE.diagonal()
    assert float(((z.flatten(1).double().mean(0) - MEAN) / (variance / n).sqrt()).abs().max()) < 5
    ratio = z.flatten(1).double().var(0) / variance
    assert float((ratio - 1).abs().max()) < 5 * (2 / n) ** 0.5 + 0.05  # 0.05: forty steps of Heun


def test_whole_steps_on_request():
    seen = []

    class Table(Exact):
        def forward(self, x, time):
            seen.append(time)
            return super().forward(x, time)

    schedule = NoiseSchedule.linear()
    whole = VariancePreserving(schedule=schedule, integer_steps=True)
    prior = AdaptedPrior(Table("epsilon", ABAR), SHAPE, whole)
    z = rand(3, *SHAPE, seed=7)
    sigma = schedule.sigmas[[0, 500, 999]]
    assert float((prior.denoise(z, sigma) - exact(z, sigma)).abs().max()) < 1e-10
    assert seen[0].dtype == torch.int64 and seen[0].tolist() == [0, 500, 999]
    between = float(schedule.sigmas[500:502].prod().sqrt()) * 1.001
    prior.denoise(z, between)
    assert seen[1].tolist() == [501] * 3


def test_times_are_fractional_monotone_and_kept_in_range():
    schedule = NoiseSchedule.linear()
    assert schedule.sigma_min == pytest.approx(0.0100005, rel=1e-5) and schedule.sigma_max == pytest.approx(
        157.4, rel=1e-3
    )
    index = torch.arange(1000, dtype=torch.float64)
    assert float((schedule.time(schedule.sigmas) - index).abs().max()) < 1e-9
    middle = (schedule.sigmas[1:] * schedule.sigmas[:-1]).sqrt()
    assert float((schedule.time(middle) - index[:-1] - 0.5).abs().max()) < 1e-9
    assert schedule.time(torch.tensor([1e-4, 1e4])).tolist() == [0.0, 999.0]
    assert schedule.time(torch.tensor([1.0], dtype=torch.bfloat16)).dtype == torch.float32


# Ends of the noise schedules, computed with diffusers 0.42.1's DDPMScheduler in float32.
ENDS = {
    "linear": ({}, [0.0100013, 0.014832, 3.44297, 154.261]),
    "scaled_linear": ({"beta_start": 0.00085, "beta_end": 0.012}, [0.0291675, 0.0413145, 1.61828, 14.4386]),
    "squaredcos_cap_v2": ({}, [0.00642711, 0.00935135, 1.01555, 320.83]),
}


@pytest.mark.parametrize("kind", ENDS)
def test_schedules_of_scheduler_configs(kind):
    changes, ends = ENDS[kind]
    schedule = NoiseSchedule.from_diffusers({**DDPM, "beta_schedule": kind, **changes})
    assert [float(schedule.sigmas[i]) for i in (0, 1, 500, 997)] == pytest.approx(ends, rel=5e-4)  # rounded there


def test_trained_betas_and_zero_terminal_snr():
    betas = [0.1, 0.2, 0.5]
    schedule = NoiseSchedule.from_diffusers({"trained_betas": betas})
    abar = np.cumprod(1 - np.array(betas))
    assert np.allclose(schedule.sigmas.numpy(), np.sqrt((1 - abar) / abar))
    zero = NoiseSchedule.from_diffusers({**DDPM, "rescale_betas_zero_snr": True})
    assert len(zero.sigmas) == 999
    assert [float(zero.sigmas[i]) for i in (0, 500, 997)] == pytest.approx([0.0100013, 3.50567, 7668.02], rel=1e-3)


def test_keys_tell_schedules_and_weights_apart():
    def key(schedule: NoiseSchedule, weight: float) -> str:
        network = nn.Conv2d(2, 2, 1)
        with torch.no_grad():
            network.weight.fill_(weight), network.bias.zero_()
        return AdaptedPrior(network, SHAPE, VariancePreserving(schedule=schedule), sigma_min=0.1, sigma_max=9.0).key

    with torch.random.fork_rng():
        one, same = key(NoiseSchedule.linear(), 1.0), key(NoiseSchedule.linear(), 1.0)
        others = {key(NoiseSchedule.linear(), 2.0), key(NoiseSchedule.linear(end=0.03), 1.0)}
    assert one == same and one not in others and len(others) == 2


class Model(nn.Module):
    """Has the call protocol and the config of a UNet2DModel: exact for the Gaussian, its mean moved by the class."""

    def __init__(self, returns: str = "object", learned_variance: bool = False, labels: bool = False, **config) -> None:
        super().__init__()
        self.returns, self.variance, self.labels = returns, learned_variance, labels
        self.config = {"in_channels": 2, "out_channels": 2, "sample_size": (2, 3), **config}
        self.calls = 0

    def forward(self, sample, timestep, class_labels=None):
        self.calls += 1
        assert timestep.shape == sample.shape[:1] and (class_labels is not None) == self.labels
        mean = MEAN if class_labels is None else MEAN + class_labels[0].double() / 10
        out = Exact("epsilon", ABAR, mean)(sample, timestep)
        out = torch.cat([out, 7 + out], 1) if self.variance else out
        return {"object": SimpleNamespace(sample=out), "tuple": (out,), "tensor": out}[self.returns]


@pytest.mark.parametrize("returns", ["object", "tuple", "tensor"])
@pytest.mark.parametrize("learned_variance", [False, True])
def test_from_diffusers_with_a_model_at_hand(returns, learned_variance):
    prior = from_diffusers(Model(returns, learned_variance), SimpleNamespace(config=DDPM))
    assert prior.shape == SHAPE and prior.sigma_max == pytest.approx(157.4, rel=1e-3)
    z = rand(4, *SHAPE)
    sigma = torch.tensor([0.02, 0.3, 4.0, 100.0], dtype=torch.float64)
    assert float((prior.denoise(z, sigma) - exact(z, sigma)).abs().max()) < 1e-10
    assert float(prior.decode(z).mean()) == pytest.approx(float(z.mean()) / 2 + 0.5)


def test_classes_and_guidance():
    z = rand(4, *SHAPE)
    sigma = torch.full((4,), 0.8, dtype=torch.float64)
    free, conditional = exact(z, sigma, MEAN + 0.9), exact(z, sigma, MEAN + 0.3)
    plain = from_diffusers(Model(labels=True), DDPM, class_labels=torch.tensor([3, 3]))
    assert float((plain.denoise(z, sigma) - conditional).abs().max()) < 1e-10
    model = Model(labels=True)
    guided = from_diffusers(model, DDPM, class_labels=3, guidance=1.5, unconditional_label=9)
    assert float((guided.denoise(z, sigma) - free - 2.5 * (conditional - free)).abs().max()) < 1e-10
    assert model.calls == 2
    with pytest.raises(InputError, match="unconditional_label"):
        from_diffusers(Model(labels=True), DDPM, class_labels=3, guidance=1.5)
    with pytest.raises(InputError, match="one class"):
        from_diffusers(Model(labels=True), DDPM, class_labels=torch.tensor([3, 4]))


def test_flow_matching_and_learned_time_embeddings_of_diffusers():
    class Flow(Model):
        def forward(self, sample, timestep):
            return Exact("flow")(sample, timestep / 1000)

    prior = from_diffusers(Flow(), {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000})
    z, sigma = rand(4, *SHAPE), torch.tensor([0.02, 0.3, 4.0, 100.0], dtype=torch.float64)
    assert float((prior.denoise(z, sigma) - exact(z, sigma)).abs().max()) < 1e-10
    table = from_diffusers(Model(time_embedding_type="learned"), DDPM)
    assert table.parametrisation.integer_steps
    assert not from_diffusers(Model(time_embedding_type="positional"), DDPM).parametrisation.integer_steps


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"num_train_timesteps": 10, "beta_schedule": "linear"}, InputError, "beta_start"),
        ({**DDPM, "beta_schedule": "sigmoid"}, CapabilityError, "trained_betas"),
        ({**DDPM, "prediction_type": "flow_prediction"}, CapabilityError, "flow_prediction"),
        ({"_class_name": "ScoreSdeVeScheduler", "num_train_timesteps": 10}, CapabilityError, "ScoreSdeVe"),
        (SimpleNamespace(), InputError, "config"),
    ],
)
def test_schedulers_that_cannot_be_used(config, error, words):
    with pytest.raises(error, match=words):
        from_diffusers(Model(), config)


def test_shapes_are_checked():
    with pytest.raises(InputError, match="sample_size"):
        from_diffusers(Model(sample_size=None), DDPM)
    assert from_diffusers(Model(sample_size=None), DDPM, shape=(2, 4, 4)).shape == (2, 4, 4)
    prior = from_diffusers(Model(), DDPM)
    with pytest.raises(ShapeError, match="see at"):
        prior.denoise(rand(4, 2, 3, 3), 1.0)
    with pytest.raises(ShapeError, match="sigma"):
        prior.denoise(rand(4, *SHAPE), torch.ones(3))
    with pytest.raises(ShapeError, match="divisible by 4"):
        from_diffusers(Model(down_block_types=("a", "b", "c")), DDPM)
    with torch.random.fork_rng():
        wrong = nn.Conv2d(2, 5, 1)
    wrong.forward = lambda x, _: nn.Conv2d.forward(wrong, x)
    with pytest.raises(ShapeError, match=r"twice the channels.*\(4, 5, 2, 3\)"):
        AdaptedPrior(wrong, SHAPE, EDM()).denoise(rand(4, *SHAPE), 1.0)
    with pytest.raises(InputError, match="sigma_min"):
        AdaptedPrior(wrong, SHAPE, Denoised())


def folder(path, *, config=True, scheduler=True, weights=None, kind="UNet2DModel"):
    (path / "unet").mkdir(parents=True)
    (path / "scheduler").mkdir()
    if config:
        (path / "unet" / "config.json").write_text(
            json.dumps({"_class_name": kind, "sample_size": 8, "in_channels": 3})
        )
    if scheduler:
        (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(DDPM))
    if weights:
        (path / "unet" / weights).write_bytes(b"not read")
    return path


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match=r"scheduler_config\.json"):
        from_diffusers(folder(tmp_path / "a", scheduler=False))
    with pytest.raises(InputError, match=r"unet.config\.json"):
        from_diffusers(folder(tmp_path / "b", config=False))
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.bin is a pickle"):
        from_diffusers(folder(tmp_path / "c", weights="diffusion_pytorch_model.bin"))
    with pytest.raises(CapabilityError, match="UNet2DConditionModel"):
        from_diffusers(folder(tmp_path / "d", kind="UNet2DConditionModel"))
    latent = folder(tmp_path / "e")
    (latent / "vae").mkdir()
    with pytest.raises(CapabilityError, match="latent"):
        from_diffusers(latent)
    with pytest.raises(InputError, match="nothing is downloaded"):
        from_diffusers(tmp_path / "google/ddpm-cat-256", DDPM)


def test_a_folder_without_diffusers_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(CapabilityError, match="pip install diffusers"):
        from_diffusers(folder(tmp_path / "a", weights="diffusion_pytorch_model.safetensors"))


def test_other_libraries_are_not_imported_with_the_adapters():
    code = "import sys, invdiff.priors.adapters; assert not {'deepinv', 'diffusers', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
