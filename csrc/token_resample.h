// What the kernels of token_resample for CPU and CUDA share: shapes, checks, and the dtypes they serve.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "ops.h"

namespace segvit {

using torch::headeronly::ScalarType;
using Index = std::optional<Tensor>;

// A grid of cells behind `prefix` tokens, of which every stride-th row and column is kept, or the cells of an index.
struct Shape {
    int64_t height, width, stride;
    int64_t images, tokens, channels;  // tokens = prefix + height * width
    int64_t prefix;
    int64_t kept;  // tokens behind the prefix: of the even grid, or of the index

    int64_t low_height() const { return (height + stride - 1) / stride; }
    int64_t low_width() const { return (width + stride - 1) / stride; }
};

inline Shape full_grid(const Tensor& x, int64_t height, int64_t width, int64_t stride) {
    STD_TORCH_CHECK(
        x.dim() == 3 && x.numel() > 0 && height > 0 && width > 0 && stride > 0 && x.size(1) >= height * width,
        "token_resample: x must be [B, P + h*w, C] with B, C > 0, and the stride at least 1");
    stride = std::min(stride, std::max(height, width));  // beyond the grid all strides are the same
    Shape s{height, width, stride, x.size(0), x.size(1), x.size(2), x.size(1) - height * width, 0};
    s.kept = s.low_height() * s.low_width();
    return s;
}

inline void check_device(const Tensor& x, const Tensor& other) {
    STD_TORCH_CHECK(x.device() == other.device(), "token_resample: all tensors must be on one device");
}

// Another operand of a call: its sizes and dtype.
inline void check_like(const Tensor& x, const Tensor& other, std::initializer_list<int64_t> sizes, ScalarType dtype) {
    check_device(x, other);
    bool fits = other.scalar_type() == dtype && other.dim() == static_cast<int64_t>(sizes.size());
    for (int64_t i = 0; fits && i < other.dim(); ++i) fits = other.size(i) == sizes.begin()[i];
    STD_TORCH_CHECK(fits, "token_resample: the operands' shapes or dtypes do not fit together");
}

// Of the backward pass: gradients of the three outputs, and the statistics.
inline void check_gradients(const Shape& s, const Tensor& x, const Tensor& grad_y, const Tensor& grad_y_q,
                            const Tensor& grad_x_q, const Tensor& mean, const Tensor& rstd, ScalarType stats) {
    check_like(x, grad_y, {s.images, s.tokens, s.channels}, x.scalar_type());
    for (const Tensor* grad : {&grad_y_q, &grad_x_q})
        check_like(x, *grad, {s.images, s.prefix + s.kept, s.channels}, x.scalar_type());
    for (const Tensor* t : {&mean, &rstd}) check_like(x, *t, {s.images, s.tokens}, stats);
}

inline void check_index(const Tensor& index, int64_t images) {
    STD_TORCH_CHECK(index.dim() == 2 && index.size(0) == images && index.scalar_type() == ScalarType::Long,
                    "token_resample: cells must be an int64 index [B, M]");
}

// Of token_downsample: kept is the even grid's, or the index's.
inline Shape downsample_shape(const Tensor& x, const Tensor& weight, const Index& index, int64_t height, int64_t width,
                              int64_t stride) {
    Shape s = full_grid(x, height, width, stride);
    check_device(x, weight);
    if (index) check_device(x, *index);
    STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(2) && weight.scalar_type() == x.scalar_type(),
                    "token_downsample: norm_weight must be [C] in x's dtype");
    if (index) {
        check_index(*index, s.images);
        s.kept = index->size(1);
    }
    return s;
}

// Of token_upsample: kept is the even grid's alone.
inline Shape upsample_shape(const Tensor& x, const Tensor& skip, const Index& extra, int64_t height, int64_t width,
                            int64_t stride) {
    const Shape s = full_grid(skip, height, width, stride);
    check_device(skip, x);
    if (extra) {
        check_device(skip, *extra);
        check_index(*extra, s.images);
    }
    const int64_t length = s.prefix + s.kept + (extra ? extra->size(1) : 0);
    STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == s.images && x.size(1) == length && x.size(2) == s.channels &&
                        x.scalar_type() == skip.scalar_type(),
                    "token_upsample: x must be [B, ", length, ", C] in skip's dtype");
    return s;
}

// Calls with a value of the type that a tensor's elements have.
template <typename F>
void dispatch_half(ScalarType dtype, const char* op, F&& call) {
    switch (dtype) {
        case ScalarType::Float:
            return call(float{});
        case ScalarType::BFloat16:
            return call(torch::headeronly::BFloat16{});
        case ScalarType::Half:
            return call(torch::headeronly::Half{});
        default:
            STD_TORCH_CHECK(false, op, ": no kernel for this dtype");
    }
}

}  // namespace segvit
