// The C++ operators of segvit. Schemas are defined in Python (segvit/ops); here are implementations only.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace segvit {

using torch::stable::Tensor;

// LayerNorm of all tokens and a gather of the kept ones: y, y_q, x_q, mean, rstd.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_downsample_cpu(
    Tensor x,       // [B, T, C], T = prefix + h*w
    Tensor weight,  // [C], dtype of x
    Tensor bias,    // [C], dtype of x
    Tensor index,   // [B or 1, M] int64, cells after the prefix
    double eps, int64_t prefix);

// The gathered gradients go back to their tokens inside the LayerNorm's backward: grad_x, grad_weight, grad_bias.
std::tuple<Tensor, Tensor, Tensor> token_downsample_backward_cpu(
    Tensor grad_y,    // [B, T, C]
    Tensor grad_y_q,  // [B, prefix + M, C]
    Tensor grad_x_q,  // [B, prefix + M, C]
    Tensor x,         // [B, T, C]
    Tensor weight,    // [C]
    Tensor index,     // [B or 1, M] int64
    Tensor mean,      // [B, T] float32, or float64 beside float64
    Tensor rstd,      // [B, T]
    int64_t prefix);

}  // namespace segvit
