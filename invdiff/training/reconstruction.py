"""How good a tokenizer's pictures are: the training's loss, the held-out figures, and the tokenizer's files."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from invdiff.errors import CatalogueError, ChecksumError, InputError
from invdiff.metrics import ssim
from invdiff.networks.tokenizer import Tokenizer
from invdiff.training.export import psnr

_SCALES = 3


def gradient_difference(x: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute difference of the finite differences of pictures, over three scales, each half the one before."""
    error = x - truth
    terms = []
    for scale in range(_SCALES):
        error = F.avg_pool2d(error, 2) if scale else error
        terms += [error.diff(dim=-1).abs().mean(), error.diff(dim=-2).abs().mean()]
    return torch.stack(terms).mean()


def reconstruction_loss(
    x: Tensor, truth: Tensor, *, absolute: float, squared: float, gradients: float
) -> tuple[Tensor, Tensor]:
    """Weighted sum of mean absolute error, mean squared error and `gradient_difference`; and the squared error itself.

    Parameters
    ----------
    x, truth
        Pictures (n, ch, h, w) in [0, 1].
    absolute, squared, gradients
        Weights of the three.
    """
    mse = (x - truth).square().mean()
    loss = absolute * (x - truth).abs().mean() + squared * mse + gradients * gradient_difference(x, truth)
    return loss, mse.detach()


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, pictures: Tensor, batch: int = 250) -> tuple[Tensor, Tensor]:
    """Tokens (n, length) of pictures (n, ch, h, w) in [0, 1], and the pictures of these tokens, on the processor."""
    device = tokenizer.codebook.device
    tokens = [tokenizer.encode(part.to(device)) for part in torch.split(pictures, batch)]
    return torch.cat(tokens).cpu(), torch.cat([tokenizer.decode(t).float().cpu() for t in tokens])


def perplexity(tokens: Tensor, vocabulary_size: int) -> float:
    """Exponential of the entropy of tokens' frequencies, between 1 and the vocabulary's size."""
    p = torch.bincount(tokens.flatten(), minlength=vocabulary_size).double() / tokens.numel()
    return float(torch.special.entr(p).sum().exp())


def measure_reconstruction(tokenizer: Tokenizer, pictures: Tensor) -> dict[str, float]:
    """Figures of held-out pictures.

    Returns
    -------
        ``pictures``, ``psnr`` in dB (mean over pictures) with its standard error ``psnr_se``, ``ssim``, ``perplexity``
        of the tokens and the number of ``codes`` in use.
    """
    tokens, x = reconstruct(tokenizer, pictures)
    scores = psnr(x, pictures).double()
    return {
        "pictures": len(pictures),
        "psnr": float(scores.mean()),
        "psnr_se": float(scores.std() / len(scores) ** 0.5),
        "ssim": sum(ssim(a, b) for a, b in zip(x, pictures, strict=True)) / len(pictures),
        "perplexity": perplexity(tokens, tokenizer.vocabulary_size),
        "codes": int((torch.bincount(tokens.flatten()) > 0).sum()),
    }


def save_tokenizer(folder: Path, tokenizer: Tokenizer, settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write ``tokenizer.safetensors``, in half precision, and ``tokenizer.json``.

    Parameters
    ----------
    folder
        Where to.
    tokenizer, settings
        The tokenizer, and the keyword arguments that make it.
    about
        What else the JSON file holds.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    half = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in tokenizer.state_dict().items()}
    blob = save(half, metadata={"format": "pt"})
    (folder / "tokenizer.safetensors").write_bytes(blob)
    text = {"tokenizer": dict(settings), "sha256": hashlib.sha256(blob).hexdigest(), **about}
    (folder / "tokenizer.json").write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load a tokenizer that `save_tokenizer` wrote: frozen, in float32.

    Raises
    ------
    CatalogueError
        If there is none.
    ChecksumError
        If the weights are not those that the JSON file names.
    InputError
        If weights and settings do not fit.
    """
    from safetensors.torch import load

    weights, card = folder / "tokenizer.safetensors", folder / "tokenizer.json"
    if not weights.is_file() or not card.is_file():
        raise CatalogueError(f"There is no tokenizer in {folder}; train one with invdiff.training.tokenizer.")
    text, blob = json.loads(card.read_text(encoding="utf-8")), weights.read_bytes()
    if hashlib.sha256(blob).hexdigest() != text["sha256"]:
        raise ChecksumError(f"{weights} is not the file that {card} names; get both again.")
    try:
        with torch.random.fork_rng(devices=[]):  # first weights are drawn, and thrown away
            tokenizer = Tokenizer(**text["tokenizer"])
        tokenizer.load_state_dict({k: v.float() for k, v in load(blob).items()})
    except (TypeError, RuntimeError) as error:
        raise InputError(f"{weights} and the settings in {card} do not fit: {error}.") from error
    return tokenizer.eval().requires_grad_(requires_grad=False)
