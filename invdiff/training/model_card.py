"""The model card of a trained prior, README.md: words, and numbers that all come from its card and report.json."""

import textwrap
from collections.abc import Mapping
from typing import Any

from invdiff.priors.loading import TrainedCard
from invdiff.training.data import SETS
from invdiff.training.settings import Settings

Report = Mapping[str, Any]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Write a table of Markdown, all columns but the first set to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _named(parts: Report, kind: str) -> dict[float, Any]:
    """Find the parts of a kind by noise level."""
    return dict(sorted((float(k.split()[1]), part) for k, part in parts.items() if k.startswith(f"{kind} ")))


def _denoising(report: Report) -> str:
    parts = _named(report["parts"], "denoising")
    names = [*report["mixture"], "pooled"]
    counts = {name: next(iter(parts.values()))["prior"][name]["pictures"] for name in names}
    rows = []
    for level, part in parts.items():
        prior, noisy = part["prior"], part["noisy"]
        cells = [f"{prior[name]['mean']:.2f} ± {prior[name]['standard_error']:.2f}" for name in names]
        rows.append([f"{level:g}", f"{noisy['pooled']['mean']:.2f}", *cells])
    return table(["noise", "noisy", *(f"{name} ({counts[name]})" for name in names)], rows)


def _classical(report: Report) -> str:
    ours, theirs = _named(report["parts"], "subset"), _named(report["parts"], "classical")
    first = next(iter(theirs.values()))
    methods = [name for name in first if name != "environment"]
    rows = []
    for level, part in theirs.items():
        cells = [
            f"{part[m]['pooled']['mean']:.2f} ({part[m]['settings']['parameter']} = {part[m]['settings']['value']:.3g})"
            for m in methods
        ]
        rows.append([f"{level:g}", f"**{ours[level]['prior']['pooled']['mean']:.2f}**", *cells])
    return table(["noise", "this prior", *methods], rows)


def _calibration(report: Report) -> str:
    rows = [
        [
            f"{level:g}",
            f"{part['rms_error']:.4f}",
            f"{part['rms_foretold']:.4f}",
            f"{part['variance_ratio']:.3f} ± {part['standard_error']:.3f}",
        ]
        for level, part in _named(report["parts"], "calibration").items()
    ]
    return table(["noise", "error", "error foretold", "foretold / measured variance"], rows)


def _memory(report: Report) -> str:
    part = report["parts"]["samples"]
    rows = [
        [
            f"{word} ({d['pictures']})",
            *(f"{d[k]:.4f}" for k in ("least", "percentile_5", "median", "most")),
            *(f"{d[k]:.3f}" for k in ("least_ratio", "median_ratio")),
            str(d["copies"]),
        ]
        for word, d in (("draws", part["samples"]), ("test pictures", part["test"]))
    ]
    head = ["of", "least", "5th percentile", "median", "most", "least ratio", "median ratio", "ratio below 1/3"]
    return table(head, rows)


def _verdict(report: Report) -> str:
    ours, theirs = (report["parts"]["samples"][k] for k in ("samples", "test"))
    copies = (
        "No draw is a copy of a training picture by this measure."
        if ours["copies"] == 0
        else f"By this measure {ours['copies']} of {ours['pictures']} draws are copies of training pictures."
    )
    distance = (
        "The median distance of the draws from the training pictures is "
        f"{ours['median'] / theirs['median']:.2f} times that of the test pictures."
    )
    twins = (
        f"The {theirs['copies']} of {theirs['pictures']} test pictures below 1/3 have near copies in training: "
        "duplicates within the data sets, which favour the test figures a little."
    )
    limit = "A copy that is shifted or changed in part is not seen by a distance of pixels."
    return " ".join((copies, distance, limit, *([twins] if theirs["copies"] else [])))


def _environments(report: Report) -> str:
    seen = {tuple(part["environment"].items()) for part in report["parts"].values()}
    return "; ".join(sorted(", ".join(f"{k} {v}" for k, v in items) for items in seen))


def model_card(card: TrainedCard, train: Settings, report: Report) -> str:
    """Write the text of README.md.

    Parameters
    ----------
    card
        Of the prior.
    train
        How it was trained.
    report
        Content of report.json, every part of it there.
    """
    s, network, how = report["settings"], card.network, card.training
    total = sum(report["mixture"].values())
    data = "\n".join(
        f"- **{name}** ({share / total:.0%} of each batch): "
        f"{SETS[name].source}; {SETS[name].licence}. "
        f"{SETS[name].attribution} {sum(n for _, n in SETS[name].files[:-1])} pictures for training, "
        f"{SETS[name].validation} for validation, "
        f"{SETS[name].test} for test."
        for name, share in report["mixture"].items()
    )
    most = next(iter(_named(report["parts"], "denoising").values()))["prior"]["pooled"]["pictures"]
    subset = next(iter(_named(report["parts"], "subset").values()))["prior"]["pooled"]["pictures"]
    checked = next(iter(_named(report["parts"], "calibration").values()))["pictures"]
    patch = s["NL-means"]
    return filled(f"""# {card.name}

Written by `python -m invdiff.training.report`; its numbers come from `prior.toml` and `report.json`.

{card.description} A diffusion prior for image restoration: a denoiser for noise levels {card.sigma_min:g} to
{card.sigma_max:g} in latent
units of [-1, 1], and with it the score of every noised distribution of small photographs.

    prior = invdiff.load_prior("{card.name}")   # {" x ".join(map(str, card.shape))}
    prior = prior.at((3, 128, 96))             # the same weights on another grid, sides divisible by 8

## Network
A fully convolutional U-Net in the preconditioning of EDM (Karras et al. 2022, arXiv:2206.00364):
{report["parameters"]:,} parameters,
widths {_words(network["channels"])}, residual blocks {_words(network["blocks"])} a level on the way down and, but
for the coarsest, up,
self-attention on {sum(network["attention"])} of {len(network["attention"])} levels; {report["bytes"] / 1e6:.1f} MB
in half precision,
computed in {card.dtype}. The file also holds the measured error of the denoiser by noise level, colour and spatial
frequency
(`prior.curvature`), on validation pictures.

## Data
{data}

## Training
{how["steps"]:,} steps of {train.batch} pictures ({how["images"] / 1e6:.2f} million) in {how["seconds"]:.0f} s of
training on {how["device"]}, torch {how["torch"]}; Adam, peak learning rate {train.learning_rate:g},
power-function moving average of the weights.
ln(sigma) is normal with mean {train.p_mean:g} and standard deviation {train.p_std:g}. Photographs are mirrored, a
quarter of them zoomed
by up to 1.25; aerial images are cut, halved, turned and mirrored. The command, on a machine of two GPUs:

    torchrun --standalone --nproc_per_node 2 -m invdiff.training.train priors/{card.name}/train.toml \\
        --data FOLDER --out FOLDER --seconds {_budget(how)} --compile

The weights are licensed {card.licence}.

## Denoising
Peak signal-to-noise ratio in dB by the noise's standard deviation, of pictures in [0, 1]: the estimate is clipped to
[0, 1], the mean
taken over pictures, with its standard error. Test split, {most} pictures in all (aerial images: their central 64 x 64).

{_denoising(report)}

Beside classical denoisers of scikit-image, all told the noise level, on the first pictures of each test split,
{subset} in all, and on the
same noise. NL-means: patches of {patch["patch_size"]} x {patch["patch_size"]} sought within
{patch["patch_distance"]} pixels, fast mode. Wavelets:
BayesShrink, soft, YCbCr. The parameter in brackets was tuned at each level on {s["tuning"]} validation pictures of
each data set.

{_classical(report)}

## What its error means for posteriors
For the exact denoiser of a distribution, the mean squared error is sigma^2 times the trace of the denoiser's own
Jacobian (Tweedie's
second-order formula). On {checked} test pictures, root mean square a pixel:

{_calibration(report)}

A ratio of one says that the denoiser is as sure as it should be, on average, about pictures like those that it was
trained on; above one,
posterior spread is too wide, below one too narrow. It says nothing about a single picture, about structure that the
network never saw,
or about the error of a sampler. A posterior drawn with this prior is the posterior of *this model*: where the
measurement is silent, the
draws show what web photographs of 2003 and aerial images look like at 64 x 64, and their spread is that of the model.

## Draws
{s["samples"]} unconditional draws, none chosen: Heun's method on {s["steps"]} noise levels,
{report["parts"]["samples"]["evaluations_per_sample"]} network
evaluations each; shown in 256 colours.

![{s["samples"]} unconditional draws](samples.png)

The twelve draws that are most like copies (of the least ratio of the table below), each above its nearest training
picture in mean squared difference, mirrored ones (and aerial crops and turns) included:

![The twelve draws most like copies, each above its nearest training picture](neighbours.png)

Distance to the nearest training picture, root mean square a pixel in [0, 1], and its ratio to that of the second
nearest, which is below
1/3 for a copy (Yoon et al. 2023):

{_memory(report)}

{_verdict(report)}

## Use and limits
- For: inverse problems on small natural pictures (deblurring, inpainting, super-resolution, tomography as a
demonstration), and for
  comparing posterior samplers on one fixed prior. Other sides divisible by 8 work; structure beyond 64 pixels was
never seen.
- Not for: identifying people, medical or forensic conclusions, or any decision that hangs on a detail which the
measurement does not
  determine. The photographs are from web searches of 2003, among them several hundred of faces, with the biases of
such searches;
  draws show faces that are invented but may resemble people in those photographs.
- Pictures are 8-bit sRGB values, not linear light, and were once JPEG or WebP files: faint compression traces are
part of the model.
- Unconditional draws have textures and layouts of photographs but rarely whole objects: a network of this size,
trained in minutes,
  knows local structure better than global. Denoising at small and moderate noise is what it is good at.

Measured with {_environments(report)}.
""")


def filled(text: str) -> str:
    """Fill paragraphs and list items of a Markdown text to 120 columns; code, tables, headings and pictures stay."""
    blocks = []
    for block in text.strip().split("\n\n"):
        heading, _, body = block.partition("\n") if block.startswith("#") else ("", "", block)
        if body and not body.startswith(("    ", "|", "![")):
            items = body.removeprefix("- ").split("\n- ") if body.startswith("- ") else [body]
            bullet = "- " if body.startswith("- ") else ""
            body = "\n".join(
                textwrap.fill(
                    " ".join(item.split()),
                    120,
                    initial_indent=bullet,
                    subsequent_indent=" " * len(bullet),
                    break_long_words=False,
                    break_on_hyphens=False,
                )
                for item in items
            )
        blocks.append("\n".join(part for part in (heading, body) if part))
    return "\n\n".join(blocks) + "\n"


def _words(values: Any) -> str:
    return ", ".join(map(str, values)) if isinstance(values, (list, tuple)) else str(values)


def _budget(how: Mapping[str, Any]) -> int:
    """Round the time used down to ten seconds: what was asked for, as a training stops at its first step beyond."""
    return int(how["seconds"]) // 10 * 10
