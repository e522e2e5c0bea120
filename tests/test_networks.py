"""The U-Net: its size, the pictures it takes, its derivatives, its start at zero, and its errors."""

import pytest
import torch

from invdiff.errors import InputError
from invdiff.networks import UNet


def unet(seed: int = 0, **settings: object) -> UNet:
    """A small network with random weights everywhere, also where training starts from zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        small = {"channels": (32, 32, 64), "blocks": (1, 2, 1), "attention": (False, True, True), "embedding": 16}
        network = UNet(3, **{**small, **settings}).double()
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.05 if p.ndim > 1 else 0.3)
    return network.requires_grad_(requires_grad=False)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_shipped_size_stays_small() -> None:
    with torch.random.fork_rng(devices=[]):
        network = UNet()
    assert 4.9e6 < sum(p.numel() for p in network.parameters()) <= 5.1e6
    assert network.stride == 8


def test_training_starts_from_the_zero_function() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet(3, (16, 32), (1, 1), (False, True), embedding=16)
    x = normal(2, 3, 8, 8).float()
    assert torch.equal(network(x, torch.tensor([-1.0, 0.5])), torch.zeros(2, 3, 8, 8))
    assert network.conv_out.weight.count_nonzero() == 0
    assert network.conv_in.weight.count_nonzero() > 0


@pytest.mark.parametrize("sides", [(4, 4), (8, 20), (36, 12), (64, 64)])
def test_any_sides_divisible_by_the_stride_are_served(sides: tuple[int, int]) -> None:
    network, x, c = unet(), normal(2, 3, *sides), torch.tensor([-0.5, 0.1], dtype=torch.float64)
    out = network(x, c)
    assert out.shape == x.shape and bool(out.isfinite().all())
    # Each picture is worked on alone, whatever stands beside it.
    torch.testing.assert_close(network(x[1:], c[1:]), out[1:], rtol=1e-10, atol=1e-12)


def test_the_output_depends_on_the_noise_level_and_on_distant_pixels() -> None:
    network, x, c = unet(), normal(1, 3, 32, 32), torch.zeros(1, dtype=torch.float64)
    out = network(x, c)
    assert float((network(x, c + 0.3) - out).abs().max()) > 1e-3
    moved = x.clone()
    moved[..., 0, 0] += 1.0
    assert float((network(moved, c) - out)[..., -1, -1].abs().max()) > 0


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.*:FutureWarning", "ignore:.*torch.jit.script.*:DeprecationWarning"
)
def test_forward_and_backward_derivatives_and_differences_agree() -> None:
    network, x, v, w = unet(), normal(1, 3, 16, 16), normal(1, 3, 16, 16, seed=1), normal(1, 3, 16, 16, seed=2)
    c = torch.tensor([0.2], dtype=torch.float64)

    def function(x: torch.Tensor) -> torch.Tensor:
        return network(x, c)

    forward = torch.func.jvp(function, (x,), (v,))[1]
    backward = torch.func.vjp(function, x)[1](w)[0]
    torch.testing.assert_close((forward * w).sum(), (backward * v).sum(), rtol=1e-9, atol=0)
    h = 1e-5
    torch.testing.assert_close(forward, (function(x + h * v) - function(x - h * v)) / (2 * h), rtol=1e-6, atol=1e-8)


def test_the_two_forms_of_attention_agree() -> None:
    from invdiff.networks import unet as module

    network, x, c = unet(), normal(1, 3, 64, 64), torch.zeros(1, dtype=torch.float64)
    assert (64 // 2) ** 2 >= module._FUSED_TOKENS > (64 // 4) ** 2  # its levels take one form each
    fused = network(x, c)
    patch = pytest.MonkeyPatch()
    with patch.context() as m:
        m.setattr(module, "_FUSED_TOKENS", 10**9)
        written = network(x, c)
    torch.testing.assert_close(written, fused, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": (1, 1)}, "for each level"),
        ({"blocks": (1, 0, 1)}, "at least 1"),
        ({"attention": (True,)}, "for each level"),
        ({"channels": (32, 40, 64)}, "divisible by the 16 groups"),
        ({"channels": (32, 48, 64)}, "heads of 32"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        unet(**settings)


def test_one_number_of_blocks_serves_all_levels() -> None:
    assert [len(stage.blocks) for stage in unet(blocks=2).encoder] == [2, 2, 2]
