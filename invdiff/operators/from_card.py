"""Operators from cards: kernels and masks that a card names, drawn by seed or read from a picture, and matrices."""

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.operators.base import Operator
from invdiff.operators.blur import Blur
from invdiff.operators.composition import Scale
from invdiff.operators.compressed_sensing import CompressedSensing
from invdiff.operators.dense import Dense
from invdiff.operators.downsampling import Downsampling
from invdiff.operators.high_dynamic_range import HighDynamicRange
from invdiff.operators.inpainting import Inpainting, box_mask, random_mask
from invdiff.operators.kernels import gaussian_kernel, motion_kernel
from invdiff.operators.nonlinear_blur import NonlinearBlur
from invdiff.operators.parity import Parity
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
        ParityCard,
        RandomMask,
    )


def operator_from_card(card: "OperatorCard", shape: tuple[int, ...], index: int = 0) -> Operator:
    """Build the operator that a card describes.

    Parameters
    ----------
    card
        The card's section ``[operator]``.
    shape
        Shape of one input; (c, h, w) of a picture.
    index
        Seeds what is random and whose card gives no seed: ``index`` modulo the card's number of seeds.

    Raises
    ------
    ShapeError
        If a kernel, mask, factor or matrix does not fit the shape.
    InputError
        If a kernel's or mask's file is missing, no picture, or holds nothing; or the operator refuses a value.
    """
    if card.type == "Identity":
        return Scale(shape)
    if card.type == "Dense":
        return Dense(torch.tensor(card.matrix, dtype=torch.float64), shape)
    if card.type == "Parity":
        return _parity(card, shape)
    if len(shape) != 3:
        raise ShapeError(f"{card.type} takes pictures (c, h, w), and the unknown has the shape {tuple(shape)}.")
    c, h, w = shape
    return _of_pictures(card, (c, h, w), index)


def _parity(card: "ParityCard", shape: tuple[int, ...]) -> Operator:
    bits = prod(shape)
    checks = torch.zeros(len(card.checks), bits, dtype=torch.float64)
    for row, members in zip(checks, card.checks, strict=True):
        if max(members, default=0) >= bits:
            raise ShapeError(f"A check takes bit {max(members)}, and there are {bits}, counted from 0.")
        row[list(members)] = 1.0
    return Parity(checks, shape)


def _of_pictures(card: "OperatorCard", shape: tuple[int, int, int], index: int) -> Operator:
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
    assert card.type == "PhaseRetrieval"
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
