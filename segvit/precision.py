"""A model in half precision, or with weights of 8 bits, to predict with."""

import torch
from torch import nn

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # as training names them
INT8 = "int8"


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """The model itself, changed: its floats become "no" (float32), "bf16" or "fp16", or its Linear weights "int8".

    A model of int8 predicts; it can neither be saved nor trained.

    Raises:
        ValueError: another precision.
        RuntimeError: int8 without torchao.
    """
    if precision == INT8:
        return quantise(model)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join((*PRECISIONS, INT8))}, got {precision!r}")
    return model.to(PRECISIONS[precision])


def quantise(model: nn.Module, config=None) -> nn.Module:
    """The model itself, its Linear layers changed by torchao: to weights of 8 bits, or as its `config` says.

    It predicts; it can neither be saved nor trained.

    Raises:
        RuntimeError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise RuntimeError("int8 needs torchao: pip install 'segvit[int8]'") from error
    for module in model.modules():
        if hasattr(module, "qkv_bias_separate"):  # of EVA and BEiT, which otherwise call F.linear past their layer
            module.qkv_bias_separate = True
    quantize_(model, Int8WeightOnlyConfig() if config is None else config)
    return model
