// token_downsample and token_upsample on the CPU. The formulas are in segvit/ops/reference/token_resample.py.
#include "../token_resample.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace segvit {
namespace {

constexpr int64_t GRAIN = 16;   // tokens a thread takes at least
constexpr int64_t CHUNKS = 64;  // fixed partition of the weight gradients' sums: the same result with any thread count

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename F>
void dispatch(ScalarType dtype, const char* op, F&& call) {
    return dtype == ScalarType::Double ? call(double{}) : dispatch_half(dtype, op, call);
}

ScalarType sum_dtype(ScalarType dtype) { return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

template <typename Job>
void run_128(const Job& job, int64_t begin, int64_t end) {
    job(begin, end);
}

#if defined(__x86_64__)
template <typename Job>
SEGVIT_AVX2 void run_256(const Job& job, int64_t begin, int64_t end) {
    job(begin, end);
}

template <typename Job>
SEGVIT_AVX512 void run_512(const Job& job, int64_t begin, int64_t end) {
    job(begin, end);
}
#endif

// job(begin, end) on all threads, compiled for the widest vectors of this processor.
template <typename Job>
void run(const Job& job, int64_t count, int64_t grain) {
    auto* variant = &run_128<Job>;
#if defined(__x86_64__)
    if (widest() == Width::v512) variant = &run_512<Job>;
    if (widest() == Width::v256) variant = &run_256<Job>;
#endif
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { variant(job, begin, end); });
}

int64_t checked(int64_t cell, int64_t cells) {
    STD_TORCH_CHECK(cell >= 0 && cell < cells, "token_resample: keep has the cell ", cell, ", but the grid has ", cells,
                    " cells");
    return cell;
}

// For every token of every image (of one image, for an even grid), the places it was gathered to, in rising order:
// places[first[t] .. first[t + 1]).
struct Gathered {
    struct Image {
        std::vector<int64_t> first, places;
    };
    std::vector<Image> images;

    Gathered(const Shape& s, const Index& index) {
        const int64_t cells = s.height * s.width;
        const int64_t* given = index ? index->const_data_ptr<int64_t>() : nullptr;
        std::vector<int64_t> tokens(s.prefix + s.kept);
        for (int64_t p = 0; p < s.prefix; ++p) tokens[p] = p;
        for (int64_t b = 0; b < (index ? s.images : 1); ++b) {
            for (int64_t k = 0; k < s.kept; ++k) {
                const int64_t cell = index ? checked(given[b * s.kept + k], cells)
                                           : k / s.low_width() * s.stride * s.width + k % s.low_width() * s.stride;
                tokens[s.prefix + k] = s.prefix + cell;
            }
            Image image{std::vector<int64_t>(s.tokens + 1, 0), std::vector<int64_t>(tokens.size())};
            for (const int64_t t : tokens) ++image.first[t + 1];
            for (int64_t t = 0; t < s.tokens; ++t) image.first[t + 1] += image.first[t];
            std::vector<int64_t> next(image.first.begin(), image.first.end() - 1);
            for (size_t place = 0; place < tokens.size(); ++place) image.places[next[tokens[place]]++] = place;
            images.push_back(std::move(image));
        }
    }

    const Image& of(int64_t b) const { return images[images.size() == 1 ? 0 : b]; }
};

template <typename Value>
struct Downsample {
    using Acc = Sum<Value>;
    const Shape& s;
    const Gathered& gathered;
    const Value *x, *weight, *bias;
    Acc eps;
    Value *y, *y_q, *x_q;
    Acc *mean, *rstd;

    SEGVIT_INLINE void operator()(int64_t begin, int64_t end) const {
        const int64_t C = s.channels, Q = s.prefix + s.kept;
        for (int64_t row = begin; row < end; ++row) {
            const int64_t b = row / s.tokens, t = row % s.tokens;
            const Value* in = x + row * C;
            Value* out = y + row * C;
            Acc sum = 0, square = 0;
            for (int64_t c = 0; c < C; ++c) sum += static_cast<Acc>(in[c]);
            const Acc m = sum / C;
            for (int64_t c = 0; c < C; ++c) square += (static_cast<Acc>(in[c]) - m) * (static_cast<Acc>(in[c]) - m);
            const Acc r = 1 / std::sqrt(square / C + eps);
            mean[row] = m;
            rstd[row] = r;
            for (int64_t c = 0; c < C; ++c)
                out[c] = static_cast<Value>((static_cast<Acc>(in[c]) - m) * r * static_cast<Acc>(weight[c]) +
                                            static_cast<Acc>(bias[c]));
            const auto& image = gathered.of(b);
            for (int64_t i = image.first[t]; i < image.first[t + 1]; ++i) {
                const int64_t to = (b * Q + image.places[i]) * C;
                std::copy(out, out + C, y_q + to);
                std::copy(in, in + C, x_q + to);
            }
        }
    }
};

template <typename Value>
struct DownsampleBackward {
    using Acc = Sum<Value>;
    const Shape& s;
    const Gathered& gathered;
    const Value *grad_y, *grad_y_q, *grad_x_q, *x, *weight;
    const Acc *mean, *rstd;
    Value* grad_x;
    Acc *weights, *biases;  // [CHUNKS, C], zeros before

    SEGVIT_INLINE void operator()(int64_t begin, int64_t end) const {
        const int64_t C = s.channels, rows = s.images * s.tokens, per_chunk = (rows + CHUNKS - 1) / CHUNKS;
        std::vector<Acc> memory(2 * C);
        Acc *g = memory.data(), *residual = g + C;
        for (int64_t chunk = begin; chunk < end; ++chunk)
            for (int64_t row = chunk * per_chunk; row < std::min(rows, (chunk + 1) * per_chunk); ++row)
                backward(row, g, residual, weights + chunk * C, biases + chunk * C);
    }

    SEGVIT_INLINE void backward(int64_t row, Acc* __restrict__ g, Acc* __restrict__ residual, Acc* __restrict__ gw,
                                Acc* __restrict__ gb) const {
        const int64_t C = s.channels, Q = s.prefix + s.kept, b = row / s.tokens, t = row % s.tokens;
        const Value *in = x + row * C, *upstream = grad_y + row * C;
        Value* __restrict__ out = grad_x + row * C;
        for (int64_t c = 0; c < C; ++c) {
            g[c] = static_cast<Acc>(upstream[c]);
            residual[c] = 0;
        }
        const auto& image = gathered.of(b);
        for (int64_t i = image.first[t]; i < image.first[t + 1]; ++i) {
            const Value *from_y = grad_y_q + (b * Q + image.places[i]) * C, *from_x = grad_x_q + (from_y - grad_y_q);
            for (int64_t c = 0; c < C; ++c) {
                g[c] += static_cast<Acc>(from_y[c]);
                residual[c] += static_cast<Acc>(from_x[c]);
            }
        }
        const Acc m = mean[row], r = rstd[row];
        Acc sum = 0, dot = 0;
        for (int64_t c = 0; c < C; ++c) {
            const Acc hat = (static_cast<Acc>(in[c]) - m) * r;
            gw[c] += g[c] * hat;
            gb[c] += g[c];
            g[c] *= static_cast<Acc>(weight[c]);
            sum += g[c];
            dot += g[c] * hat;
        }
        sum /= C;
        dot /= C;
        for (int64_t c = 0; c < C; ++c) {
            const Acc hat = (static_cast<Acc>(in[c]) - m) * r;
            out[c] = static_cast<Value>((g[c] - sum - hat * dot) * r + residual[c]);
        }
    }
};

// Where a row or column of the full grid looks: a kept one, the next, and the weight of the next.
struct Tap {
    int64_t low, high;
    double weight;

    Tap(int64_t at, int64_t kept, int64_t stride) : low(std::min(at / stride, kept - 1)) {
        high = at > low * stride ? std::min(low + 1, kept - 1) : low;  // where nothing of the next counts, not it
        weight = high == low ? 0 : static_cast<double>(at - low * stride) / stride;
    }
};

// How much the full grid's row or column `at` took of the kept `low`.
double share(int64_t at, int64_t low, int64_t kept, int64_t stride) {
    const int64_t distance = std::abs(at - low * stride);
    return low == kept - 1 && at >= low * stride ? 1 : static_cast<double>(stride - distance) / stride;
}

// The last place of every cell in extra, -1 where it is not there: [B, h * w]; empty without extra.
std::vector<int64_t> last_places(const Shape& s, const Index& extra) {
    if (!extra) return {};
    const int64_t cells = s.height * s.width, E = extra->size(1);
    const int64_t* given = extra->const_data_ptr<int64_t>();
    std::vector<int64_t> places(s.images * cells, -1);
    for (int64_t b = 0; b < s.images; ++b)
        for (int64_t e = 0; e < E; ++e) places[b * cells + checked(given[b * E + e], cells)] = e;
    return places;
}

template <typename Value>
struct Upsample {
    using Acc = Sum<Value>;
    const Shape& s;
    const std::vector<int64_t>& places;
    int64_t short_length;  // tokens of x
    const Value *x, *skip;
    Value* out;

    SEGVIT_INLINE void operator()(int64_t begin, int64_t end) const {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t b = row / s.tokens, t = row % s.tokens, cell = t - s.prefix;
            const Value* low = x + b * short_length * s.channels;
            if (cell < 0) {
                add(row, low + t * s.channels);
            } else if (!places.empty() && places[b * s.height * s.width + cell] >= 0) {
                add(row, low + (s.prefix + s.kept + places[b * s.height * s.width + cell]) * s.channels);
            } else {
                between(row, low + s.prefix * s.channels, cell);
            }
        }
    }

    SEGVIT_INLINE void add(int64_t row, const Value* own) const {
        const Value* from = skip + row * s.channels;
        Value* __restrict__ to = out + row * s.channels;
        for (int64_t c = 0; c < s.channels; ++c)
            to[c] = static_cast<Value>(static_cast<Acc>(own[c]) + static_cast<Acc>(from[c]));
    }

    SEGVIT_INLINE void between(int64_t row, const Value* low, int64_t cell) const {
        const Tap y(cell / s.width, s.low_height(), s.stride), x(cell % s.width, s.low_width(), s.stride);
        if (y.weight == 0 && x.weight == 0) return add(row, low + (y.low * s.low_width() + x.low) * s.channels);
        const int64_t C = s.channels, w = s.low_width();
        const Value *a = low + (y.low * w + x.low) * C, *b = low + (y.low * w + x.high) * C;
        const Value *c = low + (y.high * w + x.low) * C, *d = low + (y.high * w + x.high) * C;
        const Acc down = static_cast<Acc>(y.weight), right = static_cast<Acc>(x.weight);
        const Acc wa = (1 - down) * (1 - right), wb = (1 - down) * right, wc = down * (1 - right), wd = down * right;
        const Value* from = skip + row * C;
        Value* __restrict__ to = out + row * C;
        for (int64_t i = 0; i < C; ++i)
            to[i] = static_cast<Value>(wa * static_cast<Acc>(a[i]) + wb * static_cast<Acc>(b[i]) +
                                       wc * static_cast<Acc>(c[i]) + wd * static_cast<Acc>(d[i]) +
                                       static_cast<Acc>(from[i]));
    }
};

template <typename Value>
struct UpsampleBackward {
    using Acc = Sum<Value>;
    const Shape& s;
    const std::vector<int64_t>& places;
    const int64_t* extra;  // [B, E]
    int64_t short_length;
    const Value* grad;
    Value* grad_x;

    SEGVIT_INLINE void operator()(int64_t begin, int64_t end) const {
        std::vector<Acc> memory(s.channels);
        for (int64_t row = begin; row < end; ++row) {
            Acc* __restrict__ sum = memory.data();
            std::fill(sum, sum + s.channels, Acc{0});
            const int64_t b = row / short_length, place = row % short_length, k = place - s.prefix;
            const Value* full = grad + b * s.tokens * s.channels;
            const int64_t* own = places.empty() ? nullptr : places.data() + b * s.height * s.width;
            if (k < 0) {
                accumulate(sum, full + place * s.channels, 1);
            } else if (k >= s.kept) {
                const int64_t e = k - s.kept, cell = extra[b * (short_length - s.prefix - s.kept) + e];
                if (own[cell] == e) accumulate(sum, full + (s.prefix + cell) * s.channels, 1);
            } else {
                around(sum, full + s.prefix * s.channels, own, k / s.low_width(), k % s.low_width());
            }
            Value* to = grad_x + row * s.channels;
            for (int64_t c = 0; c < s.channels; ++c) to[c] = static_cast<Value>(sum[c]);
        }
    }

    SEGVIT_INLINE void around(Acc* sum, const Value* full, const int64_t* own, int64_t i, int64_t j) const {
        const int64_t reach = s.stride - 1, y1 = std::min(s.height - 1, i * s.stride + reach);
        const int64_t x1 = std::min(s.width - 1, j * s.stride + reach);
        for (int64_t y = std::max<int64_t>(0, i * s.stride - reach); y <= y1; ++y)
            for (int64_t x = std::max<int64_t>(0, j * s.stride - reach); x <= x1; ++x) {
                const int64_t cell = y * s.width + x;
                if (own && own[cell] >= 0) continue;
                const double weight = share(y, i, s.low_height(), s.stride) * share(x, j, s.low_width(), s.stride);
                accumulate(sum, full + cell * s.channels, static_cast<Acc>(weight));
            }
    }

    SEGVIT_INLINE void accumulate(Acc* __restrict__ sum, const Value* from, Acc weight) const {
        for (int64_t c = 0; c < s.channels; ++c) sum[c] += weight * static_cast<Acc>(from[c]);
    }
};

Index contiguous(const Index& index) { return index ? Index(torch::stable::contiguous(*index)) : index; }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_downsample_cpu(Tensor x, Tensor weight, Tensor bias,
                                                                        Index index, int64_t height, int64_t width,
                                                                        int64_t stride, double eps) {
    const Shape s = downsample_shape(x, weight, index, height, width, stride);
    check_like(x, bias, {s.channels}, x.scalar_type());
    for (Tensor* t : {&x, &weight, &bias}) *t = torch::stable::contiguous(*t);
    const int64_t B = s.images, T = s.tokens, C = s.channels, Q = s.prefix + s.kept;
    Tensor y = torch::stable::new_empty(x, {B, T, C}), y_q = torch::stable::new_empty(x, {B, Q, C});
    Tensor x_q = torch::stable::new_empty(x, {B, Q, C});
    const auto stats = sum_dtype(x.scalar_type());
    Tensor mean = torch::stable::new_empty(x, {B, T}, stats), rstd = torch::stable::new_empty(x, {B, T}, stats);
    const Gathered gathered(s, contiguous(index));
    dispatch(x.scalar_type(), "token_downsample", [&](auto tag) {
        using Value = decltype(tag);
        using Acc = Sum<Value>;
        run(Downsample<Value>{s, gathered, x.const_data_ptr<Value>(), weight.const_data_ptr<Value>(),
                              bias.const_data_ptr<Value>(), static_cast<Acc>(eps), y.mutable_data_ptr<Value>(),
                              y_q.mutable_data_ptr<Value>(), x_q.mutable_data_ptr<Value>(),
                              mean.mutable_data_ptr<Acc>(), rstd.mutable_data_ptr<Acc>()},
            B * T, GRAIN);
    });
    return {y, y_q, x_q, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> token_downsample_backward_cpu(Tensor grad_y, Tensor grad_y_q, Tensor grad_x_q,
                                                                 Tensor x, Tensor weight, Index index, Tensor mean,
                                                                 Tensor rstd, int64_t height, int64_t width,
                                                                 int64_t stride) {
    const Shape s = downsample_shape(x, weight, index, height, width, stride);
    check_gradients(s, x, grad_y, grad_y_q, grad_x_q, mean, rstd, sum_dtype(x.scalar_type()));
    for (Tensor* t : {&grad_y, &grad_y_q, &grad_x_q, &x, &weight, &mean, &rstd}) *t = torch::stable::contiguous(*t);
    const int64_t C = s.channels;
    Tensor grad_x = torch::stable::new_empty(x, {s.images, s.tokens, C});
    Tensor grad_weight = torch::stable::new_empty(x, {C}), grad_bias = torch::stable::new_empty(x, {C});
    const Gathered gathered(s, contiguous(index));
    dispatch(x.scalar_type(), "token_downsample_backward", [&](auto tag) {
        using Value = decltype(tag);
        using Acc = Sum<Value>;
        std::vector<Acc> weights(CHUNKS * C, 0), biases(CHUNKS * C, 0);
        run(DownsampleBackward<Value>{s, gathered, grad_y.const_data_ptr<Value>(), grad_y_q.const_data_ptr<Value>(),
                                      grad_x_q.const_data_ptr<Value>(), x.const_data_ptr<Value>(),
                                      weight.const_data_ptr<Value>(), mean.const_data_ptr<Acc>(),
                                      rstd.const_data_ptr<Acc>(), grad_x.mutable_data_ptr<Value>(), weights.data(),
                                      biases.data()},
            CHUNKS, 1);
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

Tensor token_upsample_cpu(Tensor x, Tensor skip, Index extra, int64_t height, int64_t width, int64_t stride) {
    const Shape s = upsample_shape(x, skip, extra, height, width, stride);
    x = torch::stable::contiguous(x);
    skip = torch::stable::contiguous(skip);
    Tensor out = torch::stable::new_empty(skip, {s.images, s.tokens, s.channels});
    const std::vector<int64_t> places = last_places(s, contiguous(extra));
    dispatch(x.scalar_type(), "token_upsample", [&](auto tag) {
        using Value = decltype(tag);
        run(Upsample<Value>{s, places, x.size(1), x.const_data_ptr<Value>(), skip.const_data_ptr<Value>(),
                            out.mutable_data_ptr<Value>()},
            s.images * s.tokens, GRAIN);
    });
    return out;
}

Tensor token_upsample_backward_cpu(Tensor grad, Index extra, int64_t height, int64_t width, int64_t stride) {
    const Shape s = full_grid(grad, height, width, stride);
    if (extra) check_index(*extra, s.images);
    const int64_t length = s.prefix + s.kept + (extra ? extra->size(1) : 0);
    grad = torch::stable::contiguous(grad);
    extra = contiguous(extra);
    Tensor grad_x = torch::stable::new_empty(grad, {s.images, length, s.channels});
    const std::vector<int64_t> places = last_places(s, extra);
    dispatch(grad.scalar_type(), "token_upsample_backward", [&](auto tag) {
        using Value = decltype(tag);
        run(UpsampleBackward<Value>{s, places, extra ? extra->const_data_ptr<int64_t>() : nullptr, length,
                                    grad.const_data_ptr<Value>(), grad_x.mutable_data_ptr<Value>()},
            s.images * length, GRAIN);
    });
    return grad_x;
}

}  // namespace segvit
