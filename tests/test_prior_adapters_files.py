"""Priors to and from deepinv, and checkpoints in files that are trusted with nothing."""

import io
import os
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.operators import Affine, Blur, gaussian_kernel
from invdiff.priors import FieldPrior
from invdiff.priors.adapters import (
    EDM,
    NoiseSchedule,
    VariancePreserving,
    from_deepinv,
    load_edm,
    load_guided_diffusion,
    to_deepinv,
)
from invdiff.priors.adapters.state_dicts import fill, read_state_dict, without_prefix

deepinv = pytest.importorskip("deepinv")

SHAPE = (3, 16, 16)
# 64 channels: with one a group, the norms would take the noise level away again.
SMALL = {"model_channels": 64, "channel_mult": (1, 1), "num_blocks": 1, "attn_resolutions": (8,)}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def field(scale: float = 0.5, offset: float = 0.5) -> FieldPrior:
    return FieldPrior.power_law(SHAPE, 2.0, 0.4, decoder=Affine(SHAPE, scale, offset))


@pytest.mark.parametrize("scale", [0.5, -0.25])
def test_out_to_deepinv_in_pictures(scale):
    prior = field(scale, 0.3)
    denoiser = to_deepinv(prior)
    assert isinstance(denoiser, deepinv.models.Denoiser) and denoiser.prior is prior
    x, sigma = rand(3, *SHAPE), torch.tensor([0.01, 0.1, 2.0])
    expected = prior.decode(prior.denoise(prior.encode(x), sigma / abs(scale)))
    for given in (sigma, sigma.reshape(3, 1, 1, 1)):
        assert torch.allclose(denoiser(x, given), expected, atol=1e-6)
    for given in (0.1, torch.tensor(0.1), torch.tensor([0.1])):
        assert torch.allclose(denoiser(x, given)[1], expected[1], atol=1e-6)
    with pytest.raises(ShapeError, match=r"\(3,\)"):
        denoiser(x, torch.ones(2))


def test_noise_levels_outside_the_range():
    prior = field()
    denoiser = to_deepinv(prior)
    x = rand(2, *SHAPE)
    assert torch.equal(denoiser(x, 0.0), x)
    low, high = 0.5 * prior.sigma_min, 0.5 * prior.sigma_max
    mixed = denoiser(x, torch.tensor([0.0, low / 100]))
    assert torch.equal(mixed[0], x[0]) and torch.equal(mixed[1], denoiser(x, low)[1])
    assert torch.equal(denoiser(x, 100 * high), denoiser(x, high))


def test_gradients_flow_through_both():
    denoiser = to_deepinv(field())
    x, u = rand(2, *SHAPE), rand(2, *SHAPE, seed=1)
    value, vjp = torch.func.vjp(lambda x: denoiser(x, 0.2), x)  # how deepinv takes it
    leaf = x.clone().requires_grad_()
    gradient = torch.autograd.grad(denoiser(leaf, 0.2), leaf, u)[0]
    assert torch.allclose(vjp(u)[0], gradient) and value.shape == x.shape
    assert torch.allclose(
        gradient, denoiser(u, 0.2) - denoiser(torch.zeros_like(u), 0.2), atol=1e-5
    )  # affine, symmetric
    back = from_deepinv(denoiser, SHAPE, sigma_min=0.01, sigma_max=9.0)
    leaf = x.clone().requires_grad_()
    assert torch.allclose(torch.autograd.grad(back.denoise(leaf, 0.2), leaf, u)[0], gradient)


def test_round_trips():
    prior = field()
    denoiser = to_deepinv(prior)
    same = from_deepinv(denoiser, SHAPE, sigma_min=0.5 * prior.sigma_min, sigma_max=0.5 * prior.sigma_max)
    assert same is prior
    pictures = from_deepinv(denoiser, SHAPE, sigma_min=0.02, sigma_max=5.0)
    x = rand(2, *SHAPE)
    assert torch.equal(pictures.denoise(x, 0.3), denoiser(x, 0.3))
    assert torch.equal(pictures.decode(x), x) and (pictures.sigma_min, pictures.sigma_max) == (0.02, 5.0)
    assert to_deepinv(pictures) is denoiser
    with pytest.raises(CapabilityError, match="Denoiser"):
        from_deepinv(nn.Identity(), SHAPE, sigma_min=0.01, sigma_max=1.0)
    with pytest.raises(CapabilityError, match="not white"):
        to_deepinv(FieldPrior.power_law(SHAPE, 2.0, decoder=Blur(gaussian_kernel(3, 1.0), SHAPE, "circular")))


def test_a_plain_prior_without_decoder_goes_out():
    class Plain:
        shape, sigma_min, sigma_max = SHAPE, 0.01, 10.0

        def denoise(self, z: Tensor, sigma: float | Tensor) -> Tensor:
            return z / (1 + torch.as_tensor(sigma).reshape(-1, 1, 1, 1) ** 2)

    x = rand(2, *SHAPE)
    assert torch.allclose(to_deepinv(Plain())(x, 2.0), x / 5)


def test_deepinvs_samplers_take_our_priors():
    prior = field()
    A = deepinv.physics.Denoising(deepinv.physics.GaussianNoise(0.1))
    y = prior.decode(prior.sample(1, seed=3)).float() + 0.1 * rand(1, *SHAPE, seed=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = deepinv.sampling.DDRM(to_deepinv(prior), sigmas=torch.linspace(1, 0, 30).numpy(), verbose=False)
        x = torch.cat([model(y, A) for _ in range(4)])
    exact = prior.decode(prior.denoise(prior.encode(y), 0.2))
    assert float((x.mean(0) - exact[0]).square().mean()) < float((y - exact).square().mean())


def tiny(kind: str, **settings: int) -> nn.Module:
    network = deepinv.models.ADMUNet if kind == "admunet" else deepinv.models.NCSNpp
    model_type = {} if kind == "admunet" else {"model_type": "ncsn" if kind == "ncsnpp" else "ddpm"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = network(img_resolution=16, pretrained=None, pixel_std=0.5, **model_type, **SMALL, **settings).eval()
        for p in unet.parameters():  # parts begin at zero, and would hide the noise level and the class
            p.data += 0.05 * torch.randn(p.shape)
        return unet


@pytest.mark.parametrize("kind", ["ncsnpp", "ddpmpp", "admunet"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_edm_checkpoints(tmp_path, kind, suffix):
    unet = tiny(kind, label_dim=4 if kind == "admunet" else 0, augment_dim=3)
    path = tmp_path / f"edm{suffix}"
    state = {f"model.{name}": t.detach().clone() for name, t in unet.state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save({"ema": state}, path)
    prior = load_edm(
        path,
        SHAPE,
        kind=kind,
        label=2 if kind == "admunet" else None,
        architecture=SMALL,
        entry=None if suffix == ".safetensors" else "ema",
    )
    assert prior.name == "edm" and prior.parametrisation == EDM(sigma_data=0.5) and prior.network.stride == 2
    assert not any(p.requires_grad or p.is_meta for p in prior.parameters())
    z, sigma = rand(2, *SHAPE), torch.tensor([0.3, 5.0])
    label = torch.eye(4)[[2, 2]] if kind == "admunet" else None
    with torch.no_grad():
        expected = (
            unet(z, sigma, class_labels=label, input_in_minus_one_one=True)
            if kind != "admunet"
            else deepinv.models.EDMPrecond(_Bare(unet), pixel_std=0.5)(z, sigma, class_labels=label)
        )
    assert torch.allclose(prior.denoise(z, sigma), expected, atol=1e-5)
    leaf = z.double().requires_grad_()
    D = prior.denoise(leaf, 1.0)
    assert D.dtype == torch.float64
    u = rand(2, *SHAPE, seed=2).double()
    slope = float((torch.autograd.grad(D, leaf, u)[0] * u).sum())
    step = (prior.denoise(leaf + 0.05 * u, 1.0) - prior.denoise(leaf - 0.05 * u, 1.0)).detach() / 0.1
    assert slope == pytest.approx(float((step * u).sum()), rel=1e-2)
    assert prior.at((3, 32, 24)).denoise(rand(1, 3, 32, 24), 1.0).shape == (1, 3, 32, 24)


class _Bare(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.unet.forward_unet(*args, **kwargs)


def test_ve_checkpoints_and_labels(tmp_path):
    path = tmp_path / "ve.safetensors"
    unet = tiny("ncsnpp", label_dim=2, augment_dim=0)
    save_file(unet.state_dict(), path)
    prior = load_edm(path, SHAPE, precondition="ve", architecture=SMALL)
    z = rand(2, *SHAPE)
    with torch.no_grad():
        F = unet.forward_unet(z, (torch.full((2,), 3.0) / 2).log(), class_labels=torch.zeros(2, 2))
    assert torch.allclose(prior.denoise(z, 3.0), z + 3 * F, atol=1e-5) and prior.sigma_max == 100
    with pytest.raises(InputError, match="no label 2"):
        load_edm(path, SHAPE, label=2, architecture=SMALL)


def test_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "edm.safetensors"
    state = dict(tiny("ddpmpp", augment_dim=0).state_dict())
    moved = state.pop("map_layer0.weight")
    save_file({**state, "strange.weight": moved}, path)
    with pytest.raises(InputError, match=r"lacks 1: map_layer0.weight; has in excess 1: strange.weight"):
        load_edm(path, SHAPE, kind="ddpmpp", architecture=SMALL)
    save_file({**state, "map_layer0.weight": moved[:5].clone()}, path)
    with pytest.raises(InputError, match=r"of another shape 1: map_layer0.weight \(\(5, 64\) for \(256, 64\)\)"):
        load_edm(path, SHAPE, kind="ddpmpp", architecture=SMALL)
    with pytest.raises(InputError, match="lacks"):
        load_guided_diffusion(path)
    with pytest.raises(ShapeError, match="divisible by 32"):
        load_guided_diffusion(path, (3, 40, 64))
    with pytest.raises(InputError, match="sigma_data"):
        load_edm(path, SHAPE, kind="ddpmpp", architecture=SMALL, sigma_data=0.0)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".ckpt", ".bin", ".safetensors"])
def test_pickles_are_refused_and_nothing_in_them_runs(tmp_path, suffix):
    target = tmp_path / "created"
    path = tmp_path / f"evil{suffix}"
    torch.save({"ema": Payload(str(target))}, path)
    for load in (load_edm, load_guided_diffusion):
        with pytest.raises(InputError, match="is not a safetensors file" if suffix == ".safetensors" else "save_file"):
            load(path)
    assert not target.exists()
    with zipfile.ZipFile(path) as archive:  # the payload is in there
        inner = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        assert b"mkdir" in archive.read(inner)
    path.write_bytes(f"cposix\nmkdir\n(S'{target}'\ntR.".encode())  # a bare pickle, as EDM's are
    with pytest.raises(InputError):
        load_edm(path)
    assert not target.exists()


def test_files_that_are_no_state_dict(tmp_path):
    with pytest.raises(InputError, match="There is no file"):
        read_state_dict(tmp_path / "missing.pt")
    path = tmp_path / "a.pt"
    path.write_bytes(io.BytesIO(b"not a checkpoint").getvalue())
    with pytest.raises(InputError, match="cannot be read"):
        read_state_dict(path)
    torch.save({"state_dict": {"w": torch.ones(2)}, "step": 3}, path)
    with pytest.raises(InputError, match=r"it holds state_dict, step\. Name one with entry="):
        read_state_dict(path)
    with pytest.raises(InputError, match="no entry 'ema'"):
        read_state_dict(path, entry="ema")
    assert torch.equal(read_state_dict(path, entry="state_dict")["w"], torch.ones(2))
    torch.save({}, path)
    with pytest.raises(InputError, match="no tensors"):
        read_state_dict(path)


def test_prefixes_come_off_only_where_all_have_them():
    t = torch.ones(1)
    assert list(without_prefix({"module.model.a": t, "module.model.b": t}, ("module.", "model."))) == ["a", "b"]
    assert list(without_prefix({"module.a": t, "b": t}, ("module.",))) == ["module.a", "b"]


def test_filled_networks_are_float32_wherever_the_file_was():
    with torch.device("meta"):
        network = nn.Linear(2, 3)
    fill(network, {"weight": torch.ones(3, 2).half(), "bias": torch.ones(3).double()}, "a file")
    assert {p.dtype for p in network.parameters()} == {torch.float32} and not network.weight.is_meta


def test_guided_diffusion_checkpoints(tmp_path):
    """Against deepinv's own denoiser at one of its 1000 levels; 94 million weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = deepinv.models.DiffUNet(pretrained=None).eval()
        for p in unet.parameters():  # parts begin at zero
            if not p.any():
                nn.init.normal_(p, std=0.05)
    state = {name: t for name, t in unet.state_dict().items() if "alphas_cumprod" not in name}
    save_file(state, tmp_path / "ffhq.safetensors")
    prior = load_guided_diffusion(tmp_path / "ffhq.safetensors", (3, 32, 32))
    assert prior.parametrisation == VariancePreserving(schedule=NoiseSchedule.linear())
    sigma = float(prior.parametrisation.schedule.sigmas[300])
    z = 0.1 * rand(1, 3, 32, 32)
    with torch.no_grad():
        x = unet.forward_denoise(prior.decode(z), sigma / 2)
        assert torch.allclose(prior.decode(prior.denoise(z, sigma)).clamp(0, 1), x, atol=1e-4)
    leaf = z.requires_grad_()
    assert float(torch.autograd.grad(prior.denoise(leaf, sigma).sum(), leaf)[0].abs().min()) > 0
