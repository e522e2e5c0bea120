"""The tokenizer: its contract, its codes, going on after a cut, the readers of its pictures, and JPEG beside it."""

import gzip
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from invdiff.errors import CatalogueError, ChecksumError, InputError, ShapeError
from invdiff.networks.tokenizer import Tokenizer, soft_clip
from invdiff.testing import check_operator
from invdiff.training import pictures as pictures_module
from invdiff.training.checkpoint import load_state
from invdiff.training.codebook import CodebookAverage, straight_through
from invdiff.training.jpeg import encode_jpeg, jpeg_psnr, scan_bytes
from invdiff.training.pictures import held_out, read_idx, training_pictures
from invdiff.training.reconstruction import gradient_difference, load_tokenizer, perplexity, reconstruct
from invdiff.training.settings import read_settings_as
from invdiff.training.tokenizer import TokenizerTrainer, main, make, train
from invdiff.training.tokenizer_settings import TokenizerSettings

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
SMALL = {
    "vocabulary_size": 12,
    "code": 3,
    "encoder_channels": (8, 8),
    "encoder_blocks": (0, 1),
    "decoder_channels": (8, 16),
    "decoder_blocks": (1, 1),
    "groups": 4,
}
TOML = """
name = "tiny"
shape = [1, 28, 28]
batch = 16
warmup_steps = 3
steps = 12
seconds = 1e9
log_every = 5
validate_every = 1000
[tokenizer]
vocabulary_size = 12
code = 3
encoder_channels = [8, 8]
encoder_blocks = [0, 1]
decoder_channels = [8, 16]
decoder_blocks = [1, 1]
groups = 4
[mixture]
fashion-mnist = 1
"""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokenizer(shape: tuple[int, int, int] = (1, 8, 12), **settings: object) -> Tokenizer:
    """Make one whose residual branches are not zero, as after training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Tokenizer(**{**SMALL, "shape": shape, **settings})
        for p in made.parameters():
            p.data += 0.05 * torch.randn_like(p)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rectangles on black, in an IDX file."""
    path, rng = tmp_path_factory.mktemp("fashion"), np.random.default_rng(0)
    x = np.zeros((1100, 28, 28), np.uint8)
    for picture in x:
        top, left = rng.integers(0, 20, 2)
        picture[top : top + 8, left : left + 8] = rng.integers(100, 256)
    blob = struct.pack(">IIII", 0x0803, *x.shape) + x.tobytes()
    (path / pictures_module.FASHION_TRAIN).write_bytes(gzip.compress(blob, 1))
    (path / "tokenizer.toml").write_text(TOML)
    return path


@pytest.fixture
def settings(folder: Path) -> TokenizerSettings:
    return read_settings_as(TokenizerSettings, folder / "tokenizer.toml")


# The network


@pytest.mark.parametrize(("name", "length", "most"), [("fashion-28-vq", 49, 260_000), ("photos-64-vq", 256, 1_200_000)])
def test_the_shipped_settings_give_the_promised_sizes(name: str, length: int, most: int) -> None:
    s = read_settings_as(TokenizerSettings, ROOT / "priors" / name / "tokenizer.toml")
    made = make(s)
    assert (made.length, made.vocabulary_size) == (length, s.tokenizer["vocabulary_size"])
    assert sum(v.numel() for v in made.state_dict().values()) <= most
    x = torch.rand(2, *s.shape, generator=generator())
    tokens = made.encode(x)
    assert tokens.shape == (2, length) and tokens.dtype == torch.int64
    assert made.decode(tokens).shape == x.shape


def test_tokens_are_the_nearest_codes_row_by_row() -> None:
    made = tokenizer()
    x = torch.rand(3, 1, 8, 12, generator=generator())
    z = made.encoder(2 * x - 1)
    assert made.grid == (2, 3) and z.shape == (3, 3, 2, 3)
    for i in range(3):
        for row in range(2):
            for column in range(3):
                distance = (z[i, :, row, column] - made.codebook).square().sum(1)
                assert made.encode(x)[i, 3 * row + column] == distance.argmin()


def test_the_places_of_the_grid_are_those_of_the_picture() -> None:
    made = tokenizer((1, 16, 24))  # a grid of 4 x 6
    seen: list[Tensor] = []
    made.detokeniser.layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tokens = torch.zeros(1, made.length, dtype=torch.int64)
    tokens[0, 2 * 6 + 4] = 1
    made.decode(tokens)
    expected = made.codebook[0, :, None, None].repeat(1, 4, 6)
    expected[:, 2, 4] = made.codebook[1]
    assert torch.equal(seen[0][0], expected)


def test_decoding_goes_through_the_codebook_and_stays_in_range() -> None:
    made = tokenizer()
    made.detokeniser.layers[-2].weight.data *= 300  # far beyond both edges
    tokens = torch.randint(12, (20, made.length), generator=generator())
    x = made.decode(tokens).detach()
    assert torch.equal(x, made.detokeniser(made.codebook[tokens]))
    assert 0.0 <= float(x.min()) < 0.01 and 0.99 < float(x.max()) <= 1.0 + 1e-6


def test_a_tokenizer_written_by_hand_gives_back_its_tokens() -> None:
    """Codes that are block means, an encoder that takes them, a decoder that repeats them: encode(decode) is exact."""
    made = tokenizer(
        (1, 8, 12),
        encoder_blocks=(0, 0),
        decoder_blocks=(0, 0),
        code=1,
        decoder_channels=(4, 4),
        encoder_channels=(4, 4),
    )
    made.codebook = torch.linspace(0.2, 0.8, 12)[:, None]
    made.encoder = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Hardtanh(-1, 1))  # sees 2 x - 1
    made.codebook = 2 * made.codebook - 1
    repeat = torch.nn.Upsample(scale_factor=4, mode="nearest")
    half = torch.nn.utils.skip_init(torch.nn.Conv2d, 1, 1, 1)
    half.weight.data.fill_(0.5)
    assert half.bias is not None
    half.bias.data.fill_(0.5)
    made.detokeniser.layers = torch.nn.Sequential(half, repeat)
    tokens = torch.randint(12, (5, made.length), generator=generator())
    assert torch.equal(made.encode(made.decode(tokens)), tokens)


def test_gradients_of_the_detokeniser() -> None:
    made = tokenizer((2, 4, 4), encoder_channels=(8,), decoder_channels=(8,), encoder_blocks=(0,), decoder_blocks=(1,))
    operator = made.double().detokeniser
    e = torch.randn(2, *operator.in_shape, generator=generator(), dtype=torch.float64, requires_grad=True)
    for p in operator.parameters():
        p.requires_grad_(requires_grad=False)
    assert torch.autograd.gradcheck(operator, (e,))
    check_operator(operator)


def test_precision_follows_the_input_and_the_weights() -> None:
    made = tokenizer()
    e = torch.randn(2, *made.detokeniser.in_shape, generator=generator())
    x = made.detokeniser(e)
    assert made.detokeniser(e.double()).dtype == torch.float64
    exact = made.double().detokeniser(e.double())
    torch.testing.assert_close(x.double(), exact, rtol=0, atol=1e-5)
    rough = made.bfloat16().detokeniser(e)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, x, rtol=0, atol=0.05)


def test_the_soft_clip_is_the_identity_inside_and_leaves_a_slope_at_the_edges() -> None:
    x = torch.linspace(-3, 4, 7001, dtype=torch.float64, requires_grad=True)
    y = soft_clip(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    x, y = x.detach(), y.detach()
    assert float(y.min()) >= 0 and float(y.max()) <= 1 + 1e-12 and bool((slope >= 0).all())
    inside = (x > 0.2) & (x < 0.8)
    torch.testing.assert_close(y[inside], x[inside], rtol=0, atol=1e-4)
    black = (y - 0.01).abs().argmin()
    assert 0.2 < float(slope[black]) < 0.3


def test_bad_input_is_refused() -> None:
    made = tokenizer()
    with pytest.raises(ShapeError, match=r"pictures of shape \(n, \(1, 8, 12\)\)"):
        made.encode(torch.zeros(2, 1, 8, 8))
    with pytest.raises(InputError, match=r"lie in \[0, 11\], got 0 to 12"):
        made.decode(torch.tensor([[0, 1, 2, 3, 4, 12]]))
    with pytest.raises(InputError, match=r"torch\.int64"):
        made.decode(torch.zeros(1, 6, dtype=torch.int32))
    with pytest.raises(ShapeError, match=r"\(n, 6\) tokens"):
        made.decode(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ShapeError, match="Detokeniser takes inputs"):
        made.detokeniser(torch.zeros(1, 6, 4))
    for settings in (
        {"encoder_channels": (8,)},
        {"groups": 3},
        {"vocabulary_size": 1},
        {"decoder_blocks": (1, -1)},
        {"shape": (1, 10, 12)},
    ):
        with pytest.raises(InputError):
            tokenizer(**settings)


# The codes


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other() -> None:
    z, e = torch.randn(4, 3, generator=generator(), requires_grad=True), torch.randn(4, 3, generator=generator(1))
    out = straight_through(z, e)
    torch.testing.assert_close(out, e)
    (gradient,) = torch.autograd.grad((out**2).sum(), z)
    torch.testing.assert_close(gradient, 2 * out.detach())


def nearest(z: Tensor, E: Tensor) -> Tensor:
    return torch.cdist(z, E).argmin(1)


def test_codes_are_the_weighted_means_of_their_vectors() -> None:
    codes = CodebookAverage(torch.tensor([[0.0], [10.0]]), decay=0.5)
    z = torch.tensor([[1.0], [3.0], [8.0], [2.0]])
    codes.update(z, nearest(z, codes.codebook), generator())
    # By hand: N = 1/2 + 1/2 * (3, 1) / 2, m = (0, 5) + 1/2 * (6, 8) / 2.
    torch.testing.assert_close(codes.counts, torch.tensor([1.25, 0.75]))
    torch.testing.assert_close(codes.codebook, torch.tensor([[1.5 / 1.25], [7.0 / 0.75]]))


def test_dead_codes_are_revived() -> None:
    """Codes far away from the data find it, where without revival they stay."""
    z = torch.randn(512, 2, generator=generator()).sign() * 3 + 0.1 * torch.randn(512, 2, generator=generator(1))
    errors = {}
    for revive in (True, False):
        codes = CodebookAverage(90.0 * torch.arange(32.0).reshape(16, 2), decay=0.9)
        for step in range(200):
            codes.update(z, nearest(z, codes.codebook), generator(step), revive=revive)
        tokens = nearest(z, codes.codebook)
        errors[revive] = float((z - codes.codebook[tokens]).square().sum(1).mean())
        assert len(tokens.unique()) == (16 if revive else 1)
    assert errors[True] < 0.05 < 10 < errors[False]


def test_perplexity() -> None:
    assert perplexity(torch.arange(8).repeat(3), 16) == pytest.approx(8)
    assert perplexity(torch.zeros(5, dtype=torch.int64), 16) == pytest.approx(1)


# Training


def test_training_learns_and_its_file_gives_the_same_pictures(
    folder: Path, settings: TokenizerSettings, tmp_path: Path
) -> None:
    before = torch.random.get_rng_state()
    lines: list[str] = []
    assert train(replace(settings, steps=120, learning_rate=5e-3), folder, tmp_path, CPU, log=lines.append)
    assert torch.equal(before, torch.random.get_rng_state())
    text = json.loads((tmp_path / "tokenizer.json").read_text())
    made = load_tokenizer(tmp_path)
    x = held_out("fashion-mnist", folder, "validation", 28)[:500]
    _, y = reconstruct(made, x)
    score = -10 * torch.log10((y - x).square().mean((1, 2, 3))).mean()
    assert text["validation"]["fashion-mnist"]["psnr"] == pytest.approx(float(score), abs=1e-3)
    flat = -10 * torch.log10((x - x.mean()).square().mean((1, 2, 3))).mean()
    assert float(score) > float(flat) + 3
    assert text["parameters"] == sum(v.numel() for v in made.state_dict().values())
    assert text["bits"] == pytest.approx(49 * np.log2(12)) and text["steps"] == 120
    assert not any(p.requires_grad for p in made.parameters())
    (tmp_path / "tokenizer.safetensors").write_bytes(b"other")
    with pytest.raises(ChecksumError, match="is not the file"):
        load_tokenizer(tmp_path)
    with pytest.raises(CatalogueError, match="no tokenizer"):
        load_tokenizer(folder)


def test_a_training_in_two_parts_gives_the_same_weights(
    folder: Path, settings: TokenizerSettings, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(settings, folder, whole, CPU, log=lambda _: None)
    assert not train(settings, folder, parts, CPU, limit=0.0, log=lambda _: None)  # stops at step 10
    assert not (parts / "tokenizer.json").exists()
    assert train(settings, folder, parts, CPU, resume=True, log=lambda _: None)
    (one, ours), (two, theirs) = (load_state(p / "state", settings.identity) for p in (whole, parts))
    assert ours.step == theirs.step == 12
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    with pytest.raises(InputError, match="was made with"):
        train(replace(settings, batch=8), folder, parts, CPU, resume=True)


def test_the_average_of_the_weights_follows_them(folder: Path, settings: TokenizerSettings) -> None:
    trainer = TokenizerTrainer(settings, folder, CPU)
    for _ in range(3):
        trainer.step()
    state = trainer.tokenizer.state_dict()
    ours = trainer.averaged().state_dict()
    assert ours.keys() == state.keys()
    assert 0 < max(float((ours[k] - state[k]).abs().max()) for k in state) < 0.1


def test_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml = str(folder / "tokenizer.toml")
    assert main([toml, "--data", str(folder), "--out", str(tmp_path), "--steps", "2", "--device", "cpu"]) == 0
    assert "tokenizer written to" in capsys.readouterr().out
    with pytest.raises(InputError, match="out of range: batch = 0"):
        main([toml, "--data", str(folder), "--out", str(tmp_path), "--batch", "0"])


def test_gradient_difference_sees_edges_and_not_a_shift_of_level() -> None:
    x = torch.rand(2, 1, 16, 16, generator=generator())
    assert float(gradient_difference(x + 0.1, x)) < 1e-6
    blurred = F.avg_pool2d(x, 3, 1, 1)
    assert float(gradient_difference(blurred, x)) > 0.05


# Pictures and JPEG


def test_the_readers_of_fashion_mnist(folder: Path, tmp_path: Path) -> None:
    x = read_idx(folder / pictures_module.FASHION_TRAIN)
    assert x.shape == (1100, 28, 28) and x.dtype == torch.uint8 and int(x[0].max()) >= 100
    source = training_pictures((1, 28, 28), {"fashion-mnist": 1.0}, folder, CPU)
    batch = source.batch(7, generator())
    assert batch.shape == (7, 1, 28, 28) and float(batch.min()) >= 0 and 0.3 < float(batch.max()) <= 1
    known = {picture.numpy().tobytes() for picture in x[:100]}  # all but the last 1000 are for training
    assert {(p * 255).round().to(torch.uint8).numpy().tobytes() for p in batch} <= known
    assert torch.equal(held_out("fashion-mnist", folder, "validation", 28)[0, 0], x[100].float() / 255)
    with pytest.raises(InputError, match="no held-out split"):
        held_out("fashion-mnist", folder, "train", 28)
    for mixture, shape in (({"fashion-mnist": 1.0, "caltech64": 1.0}, (1, 28, 28)), ({"caltech64": 1.0}, (1, 64, 64))):
        with pytest.raises(InputError, match="stands alone"):
            training_pictures(shape, mixture, folder, CPU)
    with pytest.raises(CatalogueError, match="is missing"):
        read_idx(tmp_path / "none.gz")
    for blob in (b"plain", gzip.compress(b"short"), gzip.compress(struct.pack(">IIII", 0x0803, 9, 28, 28))):
        (tmp_path / "bad.gz").write_bytes(blob)
        with pytest.raises(InputError):
            read_idx(tmp_path / "bad.gz")


def test_jpeg_counts_its_scan_and_nothing_else() -> None:
    x = torch.linspace(0, 1, 32).expand(3, 32, 32)
    picture = (x * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    blob = encode_jpeg(picture, 80, 0)
    start = blob.index(b"\xff\xda")
    header = int.from_bytes(blob[start + 2 : start + 4], "big")
    assert scan_bytes(blob) == len(blob) - start - 2 - header - 2
    with pytest.raises(InputError, match="no baseline JPEG"):
        scan_bytes(blob[:-2])


def test_jpeg_keeps_to_its_bits_and_improves_with_them() -> None:
    x = F.interpolate(torch.rand(3, 3, 8, 8, generator=generator()), size=(32, 32), mode="bilinear")
    few, many = jpeg_psnr(x, 1200.0), jpeg_psnr(x, 4000.0)
    assert few["jpeg_bits"] <= 1200 and few["jpeg_too_large"] == 0
    assert many["jpeg_psnr"] > few["jpeg_psnr"] + 2
    assert jpeg_psnr(x[:, :1], 8.0)["jpeg_too_large"] == 1
