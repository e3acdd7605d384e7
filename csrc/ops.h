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

// Labels [B, H, W] of any integer dtype and, unless `best` is empty, the winning scores; both are written.
void mask_decode_labels_cpu(Tensor mask_logits,  // [B, N, h, w] float32
                            Tensor class_probs,  // [B, N, K] float32
                            Tensor labels, Tensor best, double prune, double rows, double columns);

// Scores [B, K, H, W] float32, written or added.
void mask_decode_scores_cpu(Tensor mask_logits, Tensor class_probs, Tensor scores, bool add, double prune, double rows,
                            double columns);

// What focal (gamma = 2) and dice loss of the present masks need, written to sums [5, S, P] float64: with u = x for a
// negative pixel and -x for a target and s = sigmoid(u), the sums over pixels of s^2·softplus(u), the same of targets,
// s, the same of targets, and targets.
void mask_loss_sums_cpu(Tensor mask_logits,  // [S, B, N, h, w] float32
                        Tensor labels,       // [B, H, W padded to 16] int32: class, -1 ignored, -2 no pixel
                        Tensor pairs,        // [P] int64: b·N + n of the present masks
                        int64_t width, bool masked, double rows, double columns, Tensor sums);

// The gradient of the present masks, added to grad [S, B, N, h, w], from coefficients [4, S, P] float32 of the focal
// loss at negatives and targets and of the dice loss at both.
void mask_loss_gradient_cpu(Tensor mask_logits, Tensor labels, Tensor pairs, int64_t width, bool masked, double rows,
                            double columns, Tensor coefficients, Tensor grad);

}  // namespace segvit
