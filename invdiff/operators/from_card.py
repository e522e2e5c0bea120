"""Operators from cards: kernels and masks that a card names, drawn by seed or read from a picture."""

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invdiff.errors import InputError
from invdiff.operators.base import Operator
from invdiff.operators.blur import Blur
from invdiff.operators.compressed_sensing import CompressedSensing
from invdiff.operators.downsampling import Downsampling
from invdiff.operators.high_dynamic_range import HighDynamicRange
from invdiff.operators.inpainting import Inpainting, box_mask, random_mask
from invdiff.operators.kernels import gaussian_kernel, motion_kernel
from invdiff.operators.nonlinear_blur import NonlinearBlur
from invdiff.operators.phase_retrieval import PhaseRetrieval
from invdiff.operators.tomography import Tomography

if TYPE_CHECKING:
    from invdiff.card_models import (
        BoxMask,
        CompressedSensingCard,
        FileKernel,
        FileMask,
        GaussianKernel,
        MotionKernel,
        OperatorCard,
        RandomMask,
    )


def operator_from_card(card: "OperatorCard", shape: tuple[int, int, int], index: int = 0) -> Operator:
    """Build the operator that a card describes.

    Parameters
    ----------
    card
        The card's section ``[operator]``.
    shape
        Shape (c, h, w) of one input.
    index
        Seeds what is random and whose card gives no seed: ``index`` modulo the card's number of seeds.

    Raises
    ------
    ShapeError
        If a kernel, mask or factor does not fit the shape.
    InputError
        If a kernel's or mask's file is missing, no picture, or holds nothing; or the operator refuses a value.
    """
    if card.type == "Blur":
        return Blur(kernel_from_card(card.kernel, index), shape, boundary=card.boundary)
    if card.type == "Inpainting":
        return Inpainting(_mask(card.mask, shape, index), shape)
    if card.type == "Downsampling":
        return Downsampling(shape, card.factor)
    if card.type == "CompressedSensing":
        count = max(1, round(card.ratio * prod(shape)))
        return CompressedSensing(shape, count, kind=card.kind, seed=seed_of(card, index))
    if card.type == "Tomography":
        angles = card.angles if isinstance(card.angles, int) else torch.tensor(card.angles, dtype=torch.float64)
        return Tomography(shape, angles, detectors=card.detectors)
    if card.type == "HighDynamicRange":
        return HighDynamicRange(shape, card.gain)
    if card.type == "NonlinearBlur":
        return NonlinearBlur(
            shape,
            kernel=kernel_from_card(card.kernel, index),
            gamma=card.gamma,
            exposure=card.exposure,
            knee=card.knee,
            boundary=card.boundary,
        )
    return PhaseRetrieval(shape, card.oversampling)


def seed_of(part: "MotionKernel | RandomMask | BoxMask | CompressedSensingCard", index: int) -> int:
    """Seed of what a card draws: the card's own, else one of its seeds by index."""
    return index % part.seeds if part.seed is None else part.seed


def kernel_from_card(card: "GaussianKernel | MotionKernel | FileKernel", index: int = 0) -> Tensor:
    """Kernel (kh, kw) of a card, float64, sum 1.

    Raises
    ------
    InputError
        If its file is missing, no picture, or black everywhere.
    """
    if card.type == "gaussian":
        return gaussian_kernel(card.size, card.std)
    if card.type == "motion":
        return motion_kernel(card.size, card.intensity, seed_of(card, index))
    levels = _grey(card.path)
    if not float(levels.sum()) > 0:
        raise InputError(f"The kernel {card.path} is black everywhere; a kernel's values must not sum to zero.")
    return levels / levels.sum()


def _mask(card: "RandomMask | BoxMask | FileMask", shape: tuple[int, int, int], index: int) -> Tensor:
    size = shape[1:]
    if card.type == "random":
        return random_mask(size, card.observed, seed_of(card, index))
    if card.type == "box":
        side = max(1, round(card.side * min(size)))
        return box_mask(size, side, seed=None if card.centred else seed_of(card, index))
    return _grey(card.path) > 0.5


def _grey(path: str) -> Tensor:
    """Levels (h, w) of a picture, float64 in [0, 1]."""
    from invdiff.images import read_image

    return read_image(Path(path), grey=True).pixels[0].to(torch.float64)
