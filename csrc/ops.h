// The C++ operators of segvit. Schemas are defined in Python (segvit/ops); here are implementations only.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace segvit {

using torch::stable::Tensor;

// LayerNorm of all tokens and a gather of the kept ones, which are the cells of an index [B, M] int64, or without it
// every stride-th row and column: y, y_q, x_q, mean, rstd.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_downsample_cpu(Tensor x,  // [B, T, C], T = prefix + h * w
                                                                        Tensor weight, Tensor bias,  // [C], as x
                                                                        std::optional<Tensor> index, int64_t height,
                                                                        int64_t width, int64_t stride, double eps);

// The gathered gradients go back to their tokens inside the LayerNorm's backward: grad_x, grad_weight, grad_bias.
std::tuple<Tensor, Tensor, Tensor> token_downsample_backward_cpu(
    Tensor grad_y,    // [B, T, C]
    Tensor grad_y_q,  // [B, prefix + M, C]
    Tensor grad_x_q,  // [B, prefix + M, C]
    Tensor x, Tensor weight, std::optional<Tensor> index,
    Tensor mean,  // [B, T] float32, or float64 beside float64
    Tensor rstd, int64_t height, int64_t width, int64_t stride);

// The even grid's tokens back on the full grid, the cells of extra [B, E] with their own, plus the skip: [B, T, C].
Tensor token_upsample_cpu(Tensor x,     // [B, prefix + M + E, C]
                          Tensor skip,  // [B, T, C]
                          std::optional<Tensor> extra, int64_t height, int64_t width, int64_t stride);

// The gradient of x; that of the skip is grad itself.
Tensor token_upsample_backward_cpu(Tensor grad, std::optional<Tensor> extra, int64_t height, int64_t width,
                                   int64_t stride);

// The same four on CUDA: float32, bfloat16 and float16.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_downsample_cuda(Tensor x, Tensor weight, Tensor bias,
                                                                         std::optional<Tensor> index, int64_t height,
                                                                         int64_t width, int64_t stride, double eps);
std::tuple<Tensor, Tensor, Tensor> token_downsample_backward_cuda(Tensor grad_y, Tensor grad_y_q, Tensor grad_x_q,
                                                                  Tensor x, Tensor weight, std::optional<Tensor> index,
                                                                  Tensor mean, Tensor rstd, int64_t height,
                                                                  int64_t width, int64_t stride);
Tensor token_upsample_cuda(Tensor x, Tensor skip, std::optional<Tensor> extra, int64_t height, int64_t width,
                           int64_t stride);
Tensor token_upsample_backward_cuda(Tensor grad, std::optional<Tensor> extra, int64_t height, int64_t width,
                                    int64_t stride);

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
