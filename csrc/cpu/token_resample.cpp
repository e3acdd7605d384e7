// token_downsample on the CPU. The formula is in segvit/ops/reference/token_resample.py.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../ops.h"

namespace segvit {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t GRAIN = 16;   // tokens a thread takes at least
constexpr int64_t CHUNKS = 64;  // fixed partition of the weight gradients' sums: the same result with any thread count

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename F>
void dispatch(ScalarType dtype, const char* op, F&& call) {
    switch (dtype) {
        case ScalarType::Double:
            return call(double{});
        case ScalarType::Float:
            return call(float{});
        case ScalarType::BFloat16:
            return call(torch::headeronly::BFloat16{});
        case ScalarType::Half:
            return call(torch::headeronly::Half{});
        default:
            STD_TORCH_CHECK(false, op, ": x must be float64, float32, bfloat16 or float16");
    }
}

ScalarType sum_dtype(ScalarType dtype) { return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

void check(const Tensor& x, const Tensor& weight, const Tensor& index, int64_t prefix) {
    STD_TORCH_CHECK(x.dim() == 3, "token_downsample: x must be [B, P + h*w, C]");
    STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(2) && weight.scalar_type() == x.scalar_type(),
                    "token_downsample: norm_weight must be [C] in x's dtype");
    STD_TORCH_CHECK(index.dim() == 2 && (index.size(0) == 1 || index.size(0) == x.size(0)) &&
                        index.scalar_type() == ScalarType::Long,
                    "token_downsample: keep must be an int64 index [B, M]");
    const Tensor cells = torch::stable::contiguous(index);
    const int64_t* cell = cells.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < cells.numel(); ++i) {
        STD_TORCH_CHECK(cell[i] >= 0 && cell[i] < x.size(1) - prefix, "token_downsample: keep has the cell ", cell[i],
                        ", but the grid has ", x.size(1) - prefix, " cells");
    }
}

// For every token of one index row, the places it was gathered to: places[first[t] .. first[t + 1]).
struct Gathered {
    std::vector<int64_t> first, places;

    Gathered(const int64_t* cells, int64_t kept, int64_t tokens, int64_t prefix)
        : first(tokens + 1, 0), places(prefix + kept) {
        auto token = [&](int64_t place) { return place < prefix ? place : prefix + cells[place - prefix]; };
        for (int64_t place = 0; place < prefix + kept; ++place) ++first[token(place) + 1];
        for (int64_t t = 0; t < tokens; ++t) first[t + 1] += first[t];
        std::vector<int64_t> next(first.begin(), first.end() - 1);
        for (int64_t place = 0; place < prefix + kept; ++place) places[next[token(place)]++] = place;
    }
};

std::vector<Gathered> invert(const Tensor& index, int64_t tokens, int64_t prefix) {
    std::vector<Gathered> rows;
    const int64_t kept = index.size(1);
    for (int64_t b = 0; b < index.size(0); ++b)
        rows.emplace_back(index.const_data_ptr<int64_t>() + b * kept, kept, tokens, prefix);
    return rows;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_downsample_cpu(Tensor x, Tensor weight, Tensor bias,
                                                                        Tensor index, double eps, int64_t prefix) {
    check(x, weight, index, prefix);
    x = torch::stable::contiguous(x);
    weight = torch::stable::contiguous(weight);
    bias = torch::stable::contiguous(bias);
    index = torch::stable::contiguous(index);
    const int64_t B = x.size(0), T = x.size(1), C = x.size(2), Q = prefix + index.size(1);
    Tensor y = torch::stable::new_empty(x, {B, T, C}), y_q = torch::stable::new_empty(x, {B, Q, C});
    Tensor x_q = torch::stable::new_empty(x, {B, Q, C});
    const auto stats = sum_dtype(x.scalar_type());
    Tensor mean = torch::stable::new_empty(x, {B, T}, stats), rstd = torch::stable::new_empty(x, {B, T}, stats);
    const std::vector<Gathered> gathered = invert(index, T, prefix);

    dispatch(x.scalar_type(), "token_downsample", [&](auto tag) {
        using Value = decltype(tag);
        using Acc = Sum<Value>;
        const Value *px = x.const_data_ptr<Value>(), *pw = weight.const_data_ptr<Value>();
        const Value* pb = bias.const_data_ptr<Value>();
        Value *py = y.mutable_data_ptr<Value>(), *pyq = y_q.mutable_data_ptr<Value>();
        Value* pxq = x_q.mutable_data_ptr<Value>();
        Acc *pm = mean.mutable_data_ptr<Acc>(), *pr = rstd.mutable_data_ptr<Acc>();
        torch::stable::parallel_for(0, B * T, GRAIN, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const int64_t b = row / T, t = row % T;
                const Value* in = px + row * C;
                Value* out = py + row * C;
                Acc sum = 0, square = 0;
                for (int64_t c = 0; c < C; ++c) sum += static_cast<Acc>(in[c]);
                const Acc m = sum / C;
                for (int64_t c = 0; c < C; ++c) square += (static_cast<Acc>(in[c]) - m) * (static_cast<Acc>(in[c]) - m);
                const Acc r = 1 / std::sqrt(square / C + static_cast<Acc>(eps));
                pm[row] = m;
                pr[row] = r;
                for (int64_t c = 0; c < C; ++c)
                    out[c] = static_cast<Value>((static_cast<Acc>(in[c]) - m) * r * static_cast<Acc>(pw[c]) +
                                                static_cast<Acc>(pb[c]));
                const Gathered& places = gathered[gathered.size() == 1 ? 0 : b];
                for (int64_t i = places.first[t]; i < places.first[t + 1]; ++i) {
                    const int64_t to = (b * Q + places.places[i]) * C;
                    std::copy(out, out + C, pyq + to);
                    std::copy(in, in + C, pxq + to);
                }
            }
        });
    });
    return {y, y_q, x_q, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> token_downsample_backward_cpu(Tensor grad_y, Tensor grad_y_q, Tensor grad_x_q,
                                                                 Tensor x, Tensor weight, Tensor index, Tensor mean,
                                                                 Tensor rstd, int64_t prefix) {
    check(x, weight, index, prefix);
    for (Tensor* t : {&grad_y, &grad_y_q, &grad_x_q, &x, &weight, &index, &mean, &rstd})
        *t = torch::stable::contiguous(*t);
    const int64_t B = x.size(0), T = x.size(1), C = x.size(2), Q = prefix + index.size(1);
    Tensor grad_x = torch::stable::new_empty(x, {B, T, C});
    Tensor grad_weight = torch::stable::new_empty(x, {C}), grad_bias = torch::stable::new_empty(x, {C});
    const std::vector<Gathered> gathered = invert(index, T, prefix);

    dispatch(x.scalar_type(), "token_downsample_backward", [&](auto tag) {
        using Value = decltype(tag);
        using Acc = Sum<Value>;
        const Value *pgy = grad_y.const_data_ptr<Value>(), *pgyq = grad_y_q.const_data_ptr<Value>();
        const Value *pgxq = grad_x_q.const_data_ptr<Value>(), *px = x.const_data_ptr<Value>();
        const Value* pw = weight.const_data_ptr<Value>();
        const Acc *pm = mean.const_data_ptr<Acc>(), *pr = rstd.const_data_ptr<Acc>();
        Value* pgx = grad_x.mutable_data_ptr<Value>();
        std::vector<Acc> weights(CHUNKS * C, 0), biases(CHUNKS * C, 0);
        const int64_t rows = B * T, per_chunk = (rows + CHUNKS - 1) / CHUNKS;
        torch::stable::parallel_for(0, CHUNKS, 1, [&](int64_t begin, int64_t end) {
            std::vector<Acc> g(C), residual(C);
            for (int64_t chunk = begin; chunk < end; ++chunk) {
                Acc *gw = &weights[chunk * C], *gb = &biases[chunk * C];
                for (int64_t row = chunk * per_chunk; row < std::min(rows, (chunk + 1) * per_chunk); ++row) {
                    const int64_t b = row / T, t = row % T;
                    for (int64_t c = 0; c < C; ++c) {
                        g[c] = static_cast<Acc>(pgy[row * C + c]);
                        residual[c] = 0;
                    }
                    const Gathered& places = gathered[gathered.size() == 1 ? 0 : b];
                    for (int64_t i = places.first[t]; i < places.first[t + 1]; ++i) {
                        const int64_t from = (b * Q + places.places[i]) * C;
                        for (int64_t c = 0; c < C; ++c) {
                            g[c] += static_cast<Acc>(pgyq[from + c]);
                            residual[c] += static_cast<Acc>(pgxq[from + c]);
                        }
                    }
                    const Acc m = pm[row], r = pr[row];
                    Acc sum = 0, dot = 0;
                    for (int64_t c = 0; c < C; ++c) {
                        const Acc hat = (static_cast<Acc>(px[row * C + c]) - m) * r;
                        gw[c] += g[c] * hat;
                        gb[c] += g[c];
                        g[c] *= static_cast<Acc>(pw[c]);
                        sum += g[c];
                        dot += g[c] * hat;
                    }
                    for (int64_t c = 0; c < C; ++c) {
                        const Acc hat = (static_cast<Acc>(px[row * C + c]) - m) * r;
                        pgx[row * C + c] = static_cast<Value>((g[c] - sum / C - hat * dot / C) * r + residual[c]);
                    }
                }
            }
        });
        Value *pgw = grad_weight.mutable_data_ptr<Value>(), *pgb = grad_bias.mutable_data_ptr<Value>();
        for (int64_t c = 0; c < C; ++c) {
            Acc w = 0, b = 0;
            for (int64_t chunk = 0; chunk < CHUNKS; ++chunk) {
                w += weights[chunk * C + c];
                b += biases[chunk * C + c];
            }
            pgw[c] = static_cast<Value>(w);
            pgb[c] = static_cast<Value>(b);
        }
    });
    return {grad_x, grad_weight, grad_bias};
}

}  // namespace segvit
