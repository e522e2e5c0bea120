"""The model card and the picture of draws of a trained masked prior, from its card, settings and report.json.

    python -m invdiff.training.masked_card priors/fashion-28-vq [--data FOLDER]

With the data, of sequences of symbols the baseline of `markov` is measured too, and kept in report.json.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from invdiff.priors.masked_loading import MaskedCard, load_masked_prior, read_masked_card
from invdiff.priors.masked_network import MaskedNetworkPrior
from invdiff.training.markov import baseline
from invdiff.training.masked_settings import MaskedSettings
from invdiff.training.model_card import filled, table
from invdiff.training.sequences import training_sequences
from invdiff.training.settings import read_settings_as

DRAWS = (5, 8)
"""Rows and columns of the picture of draws."""
_DATA = {
    "fashion-mnist": "59 000 of the 60 000 training pictures of Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv "
    "1708.07747; MIT); the last 1000 are for validation, and 2000 of its test pictures for test.",
    "caltech64": "6144 photographs of Caltech-101 (Fei-Fei, Fergus, Perona 2004; CC BY 4.0), 64 x 64, mirrored and "
    "zoomed; 1000 for validation, 2000 for test.",
    "ucmerced128": "1400 aerial images of UC Merced Land Use (Yang & Newsam 2010; USGS imagery, public domain), cut, "
    "turned and mirrored; 200 for validation, 500 for test.",
    "promoters": "promoters of Arabidopsis and mouse, 251 nucleotides, in the compilation of Umarov & Solovyev "
    "2017 (EPDnew), each sequence once; eight tenths by hash for training, one for validation, one for test.",
}


def draws_picture(prior: MaskedNetworkPrior, path: Path) -> None:
    """Write a grid of unconditional draws, none chosen."""
    from PIL import Image

    rows, columns = DRAWS
    x = prior.decode(prior.sample(rows * columns, seed=0)).clamp(0, 1)
    c, h, w = x.shape[1:]
    grid = x.reshape(rows, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
    values = (255 * grid).round().byte().numpy()
    picture, scale = Image.fromarray(values.squeeze(-1) if c == 1 else values), max(1, 128 // h)
    size = (scale * picture.width, scale * picture.height)
    picture.resize(size, Image.Resampling.NEAREST).quantize(256).save(path, optimize=True)


def _reconstruction(report: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            f"{t['pictures']}",
            f"{t['psnr']:.2f} ± {t['psnr_se']:.2f}",
            f"{t['ssim']:.3f}",
            f"{t['jpeg_psnr']:.2f}",
            f"{t['codes']}",
            f"{t['perplexity']:.0f}",
        ]
        for name, t in report["tokenizer"]["test"].items()
    ]
    head = ["test pictures", "number", "PSNR, dB", "SSIM", "JPEG's PSNR, dB", "codes in use", "perplexity"]
    return table(head, rows)


def _bound(report: Mapping[str, Any]) -> str:
    rows = [
        [split, f"{b['sequences']}", f"{b['bits_per_token']:.4f} ± {b['bits_per_token_se']:.4f}"]
        for split, b in report["bound"].items()
    ]
    return table(["split", "sequences", "bits a token"], rows)


def _baseline(report: Mapping[str, Any]) -> str:
    """Say what is known without a network."""
    if "markov" not in report:
        return "2 bits is no knowledge"
    m = report["markov"]
    return (
        f"2 bits is no knowledge, and a Markov chain of order {m['order']}, the best of its kind, a table of counts, "
        f"has {m['bits_per_token']:.4f} ± {m['bits_per_token_se']:.4f}: the network knows little more than that"
    )


def masked_model_card(card: MaskedCard, train: MaskedSettings, report: Mapping[str, Any]) -> str:
    """Write the text of README.md."""
    n, how, t = card.network, card.training, card.tokenizer
    length, V = 1, n["vocabulary_size"]
    for side in n["axes"]:
        length *= side
    pictures = bool(t)
    data = "\n".join(
        f"- **{name}** ({share:.0%} of each batch): {_DATA[name]}" for name, share in train.mixture.items()
    )
    tokens = (
        f"{length} tokens of {V} kinds, the codes of a tokenizer on a grid of {' x '.join(map(str, n['axes']))}"
        if pictures
        else f"{length} tokens, the symbols {', '.join(card.alphabet)}"
    )
    tokenizer = ""
    if pictures:
        made = report["tokenizer"]
        tokenizer = f"""## Tokenizer
A convolutional autoencoder with a codebook learnt by moving averages (van den Oord et al. 2017, arXiv 1711.00937):
{made["parameters"]:,} parameters, codes of {t["code"]} dimensions, {made["bits"]:.0f} bits a picture; trained for
{made["steps"]:,} steps in {made["seconds"]:.0f} s on {made["device"]}. What it makes of test pictures, beside JPEG at
as many bits (its entropy-coded data alone are counted, headers and tables come free; the better of 4:4:4 and 4:2:0):

{_reconstruction(report)}

What the tokenizer leaves out, no posterior under this prior can show.

"""
    draws = (
        """## Draws
Unconditional draws, none chosen, in as many steps as tokens:

![Unconditional draws](samples.png)

"""
        if pictures
        else ""
    )
    first = (
        f"    python -m invdiff.training.tokenizer priors/{card.name}/tokenizer.toml --data FOLDER --out TOKENIZER\n"
        if pictures
        else ""
    )
    option = " --tokenizer TOKENIZER" if pictures else ""
    limits = (
        "A posterior drawn with it is the posterior of this model, a small one trained in minutes: it knows local "
        "structure better than whole objects. Draws may resemble people in the photographs that it was trained on; "
        "it serves to compare samplers, not to identify anyone or to decide anything."
        if pictures
        else "It knows composition, motifs and where they stand; nothing of the cell. A sequence that it likes has not "
        "been shown to work."
    )
    decoded = " x ".join(map(str, train.shape)) if pictures else f"one-hot, {length} x {V}"
    unit = (
        "pixel value of test pictures, of the tokens alone: what the tokenizer leaves out is not counted"
        if pictures
        else f"nucleotide of test sequences; {_baseline(report)}"
    )
    return filled(f"""# {card.name}

Written by `python -m invdiff.training.masked_card`; its numbers come from `prior.toml` and `report.json`.

{card.description} A masked diffusion prior: a network that gives the law of every hidden token given the known ones,
whatever is hidden. A sequence has {tokens}.

    prior = invdiff.load_prior("{card.name}")
    tokens = prior.sample(16, seed=0)       # ({16}, {length})
    x = prior.decode(tokens)                # {decoded}

{tokenizer}## Transformer
{report["parameters"]:,} parameters: width {n["width"]}, {n["depth"]} layers of {n["heads"]} heads, no time (Ou et al.
2024, arXiv 2406.03736); with all else {report["bytes"] / 2**20:.2f} MiB in half precision, computed in {card.dtype}.

## Data
{data}

## Training
{how["steps"]:,} steps of {train.batch} sequences in {how["seconds"]:.0f} s on {how["device"]}, torch {how["torch"]},
beside other trainings; AdamW, peak learning rate {train.learning_rate:g}, power-function moving average of the weights:

{first}    python -m invdiff.training.masked priors/{card.name}/train.toml{option} --data FOLDER --out FOLDER

The weights are licensed {card.licence}.

## Held-out likelihood
An upper bound on -log p, by the any-order loss with 64 masks a sequence, its standard error over sequences:

{_bound(report)}

That is {report["bits_per_dimension"]:.4f} bits a {unit}.

{draws}## Use and limits
{limits}
""")


def main(arguments: list[str] | None = None) -> None:
    """Write README.md and samples.png into a prior's folder."""
    parser = argparse.ArgumentParser(prog="invdiff.training.masked_card", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, help="folder of the data")
    options = parser.parse_args(arguments)
    folder: Path = options.folder
    card, train = read_masked_card(folder / "prior.toml"), read_settings_as(MaskedSettings, folder / "train.toml")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if options.data is not None and not card.tokenizer:
        found = training_sequences(train, options.data, None, torch.device("cpu"))
        learnt, tuned, judged = (found.held_out(split, sys.maxsize) for split in ("train", "validation", "test"))
        report["markov"] = baseline(learnt, tuned, judged, len(card.alphabet))
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if card.tokenizer:
        draws_picture(load_masked_prior(folder, card), folder / "samples.png")
    (folder / "README.md").write_text(masked_model_card(card, train, report), encoding="utf-8")


if __name__ == "__main__":
    main()
