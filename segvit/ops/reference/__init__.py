"""The operators in plain PyTorch: the source of truth that every kernel is tested against, and the fallback."""

from .atm import atm
from .mask_decode import mask_decode
from .mask_loss import mask_loss
from .token_resample import query_attention, token_downsample, token_upsample

__all__ = ["atm", "mask_decode", "mask_loss", "query_attention", "token_downsample", "token_upsample"]
