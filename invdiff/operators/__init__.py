"""Measurement operators: what an instrument does to the truth before noise is added."""

from invdiff.operators import adapters
from invdiff.operators.band_rows import BandRows
from invdiff.operators.base import SVD, LinearOperator, Operator
from invdiff.operators.blur import Blur
from invdiff.operators.coil_maps import birdcage_maps
from invdiff.operators.composition import Affine, Scale, Shifted
from invdiff.operators.compressed_sensing import CompressedSensing
from invdiff.operators.dense import Dense
from invdiff.operators.diagonal import Diagonal
from invdiff.operators.downsampling import Downsampling
from invdiff.operators.high_dynamic_range import HighDynamicRange
from invdiff.operators.inpainting import Inpainting, box_mask, random_mask
from invdiff.operators.kernels import bicubic_kernel, gaussian_kernel, motion_kernel
from invdiff.operators.mri import MRI, cartesian_mask
from invdiff.operators.nonlinear_blur import NonlinearBlur
from invdiff.operators.parity import Parity
from invdiff.operators.phase_retrieval import PhaseRetrieval
from invdiff.operators.pixelwise import Pixelwise
from invdiff.operators.reshape import Reshape
from invdiff.operators.scattered import Scattered
from invdiff.operators.separable import Separable
from invdiff.operators.stacking import Stack, stack
from invdiff.operators.tomography import Tomography
from invdiff.operators.wavelet import InverseWaveletTransform, WaveletTransform
from invdiff.operators.wavelet_decoder import WaveletDecoder
from invdiff.operators.window import Window

__all__ = [
    "MRI",
    "SVD",
    "Affine",
    "BandRows",
    "Blur",
    "CompressedSensing",
    "Dense",
    "Diagonal",
    "Downsampling",
    "HighDynamicRange",
    "Inpainting",
    "InverseWaveletTransform",
    "LinearOperator",
    "NonlinearBlur",
    "Operator",
    "Parity",
    "PhaseRetrieval",
    "Pixelwise",
    "Reshape",
    "Scale",
    "Scattered",
    "Separable",
    "Shifted",
    "Stack",
    "Tomography",
    "WaveletDecoder",
    "WaveletTransform",
    "Window",
    "adapters",
    "bicubic_kernel",
    "birdcage_maps",
    "box_mask",
    "cartesian_mask",
    "gaussian_kernel",
    "motion_kernel",
    "random_mask",
    "stack",
]
