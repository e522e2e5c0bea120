"""Networks: plain modules that know nothing of noise schedules; the priors wrap them."""

from invdiff.networks.masked_transformer import MaskedTransformer
from invdiff.networks.tokenizer import Tokenizer
from invdiff.networks.unet import UNet

__all__ = ["MaskedTransformer", "Tokenizer", "UNet"]
