"""The operators. Each name stands for a contract, a reference (segvit.ops.reference), kernels and a benchmark."""

from . import reference
from .atm import atm
from .mask_decode import mask_decode
from .mask_loss import mask_loss
from .token_resample import query_attention, token_downsample, token_upsample

__all__ = ["atm", "mask_decode", "mask_loss", "query_attention", "reference", "token_downsample", "token_upsample"]
