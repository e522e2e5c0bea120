"""Measurement operators: what an instrument does to the truth before noise is added."""

from invdiff.operators import adapters
from invdiff.operators.base import SVD, LinearOperator, Operator
from invdiff.operators.blur import Blur
from invdiff.operators.composition import Affine, Scale
from invdiff.operators.downsampling import Downsampling
from invdiff.operators.inpainting import Inpainting, box_mask, random_mask
from invdiff.operators.kernels import bicubic_kernel, gaussian_kernel, motion_kernel
from invdiff.operators.separable import Separable

__all__ = [
    "SVD",
    "Affine",
    "Blur",
    "Downsampling",
    "Inpainting",
    "LinearOperator",
    "Operator",
    "Scale",
    "Separable",
    "adapters",
    "bicubic_kernel",
    "box_mask",
    "gaussian_kernel",
    "motion_kernel",
    "random_mask",
]
