// mask_loss on the CPU for gamma = 2: interpolation, sigmoid, focal and dice sums in one pass over the labels' pixels,
// and the same again for the gradient. The formula is in segvit/ops/reference/mask_loss.py; with u = x for a negative
// pixel and -x for a target: s = sigmoid(u), focal = alpha_t s^2 softplus(u), the dice loss's probability s or 1 - s.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <vector>

#include "../ops.h"
#include "vectors.h"

namespace segvit {
namespace {

using torch::headeronly::ScalarType;

constexpr int SUMS = 5;

struct Job {
    const float* logits;    // [S, B, N, h, w]
    const int32_t* labels;  // [B, H, padded]: class, -1 where ignored, -2 where there is no pixel
    const int64_t* pairs;   // [P]: b·N + n
    int64_t S, B, N, h, w, P, height, width, padded;
    int32_t counts_above;  // labels above this take part
    Axis rows, columns;
    double* sums = nullptr;  // [5, S, P]: s^2·softplus, the same of targets, s, the same of targets, targets
    const float* coefficients = nullptr;  // [4, S, P]: of focal for negatives and targets, of dice for both
    float* grad = nullptr;                // [S, B, N, h, w], zeros before
};

// A row of cells widened to the labels' columns.
void widen(const Job& job, const float* cells, float* out) {
    for (int64_t x = 0; x < job.padded; ++x) {
        const float low = cells[job.columns.low[x]];
        out[x] = low + job.columns.weight[x] * (cells[job.columns.high[x]] - low);
    }
}

// The transpose: a row of gradients at the labels' columns into a row of cells.
void narrow(const Job& job, const float* row, float* cells) {
    for (int64_t x = 0; x < job.width; ++x) {
        cells[job.columns.low[x]] += (1 - job.columns.weight[x]) * row[x];
        cells[job.columns.high[x]] += job.columns.weight[x] * row[x];
    }
}

// s and softplus(u) of a vector of pixels with mask logits x and targets t.
template <typename Float, typename Int>
SEGVIT_INLINE void evaluate(const Float& x, const Int& t, Float& s, Float& softplus) {
    const Float u = t ? -x : x;
    Float e = u < 0.0f ? -u : u;
    exp_negative<Float, Int>(e);  // exp(-|u|), at most 1
    const Float r = 1.0f / (1.0f + e), z = e / (2.0f + e), z2 = z * z;
    s = u < 0.0f ? e * r : r;
    // log(1 + e) = 2 artanh(e / (2 + e)); z is at most 1/3
    Float series = z2 * (1.0f / 13) + 1.0f / 11;
    series = series * z2 + 1.0f / 9;
    series = series * z2 + 1.0f / 7;
    series = series * z2 + 1.0f / 5;
    series = series * z2 + 1.0f / 3;
    series = series * z2 + 1.0f;
    softplus = (u < 0.0f ? Float{} : u) + 2.0f * z * series;
}

template <typename Float>
SEGVIT_INLINE double total(const Float& v) {
    double sum = 0;
    for (size_t lane = 0; lane < sizeof(Float) / 4; ++lane) sum += v[lane];
    return sum;
}

// One mask of one stage: its sums, or its gradient.
template <int BYTES>
SEGVIT_INLINE void run_mask(const Job& job, int64_t stage, int64_t place, std::vector<float>& memory) {
    using Float = typename Lanes<BYTES>::Float;
    using Int = typename Lanes<BYTES>::Int;
    const int64_t pair = job.pairs[place], image = pair / job.N, at = stage * job.P + place, all = job.S * job.P;
    const int32_t n = static_cast<int32_t>(pair % job.N);
    const float* mask = job.logits + (stage * job.B * job.N + pair) * job.h * job.w;
    float *top = memory.data(), *bottom = top + job.padded, *grad_top = bottom + job.padded;
    float *grad_bottom = grad_top + job.padded, *grad = nullptr;
    float focal_0 = 0, focal_t = 0, dice_0 = 0, dice_t = 0;
    const bool backward = job.grad != nullptr;
    if (backward) {
        grad = job.grad + (stage * job.B * job.N + pair) * job.h * job.w;
        focal_0 = job.coefficients[at], focal_t = job.coefficients[at + all];
        dice_0 = job.coefficients[at + 2 * all], dice_t = job.coefficients[at + 3 * all];
        std::fill(grad_top, grad_top + 2 * job.padded, 0.0f);
    }
    double sums[SUMS] = {};
    int64_t low = -1;
    for (int64_t y = 0; y < job.height; ++y) {
        if (job.rows.low[y] != low) {
            if (backward && low >= 0) {
                narrow(job, grad_top, grad + low * job.w);
                narrow(job, grad_bottom, grad + std::min(low + 1, job.h - 1) * job.w);
                std::fill(grad_top, grad_top + 2 * job.padded, 0.0f);
            }
            low = job.rows.low[y];
            widen(job, mask + low * job.w, top);
            widen(job, mask + job.rows.high[y] * job.w, bottom);
        }
        const float down = job.rows.weight[y];
        const int32_t* labels = job.labels + (image * job.height + y) * job.padded;
        Float row[SUMS] = {};
        for (int64_t x = 0; x < job.padded; x += Lanes<BYTES>::count) {
            Float upper, lower, s, softplus;
            Int label;
            std::memcpy(&upper, top + x, BYTES);
            std::memcpy(&lower, bottom + x, BYTES);
            std::memcpy(&label, labels + x, BYTES);
            const Int t = label == n, valid = label > job.counts_above;
            evaluate<Float, Int>(upper + down * (lower - upper), t, s, softplus);
            s = valid ? s : Float{};
            if (backward) {
                const Float focal =
                    (t ? Float{} + focal_t : Float{} + focal_0) * s * (2.0f * (1.0f - s) * softplus + s);
                const Float g = s * ((t ? Float{} + dice_t : Float{} + dice_0) * (1.0f - s) + focal);
                Float above, below;
                std::memcpy(&above, grad_top + x, BYTES);
                std::memcpy(&below, grad_bottom + x, BYTES);
                above += (1.0f - down) * g;
                below += down * g;
                std::memcpy(grad_top + x, &above, BYTES);
                std::memcpy(grad_bottom + x, &below, BYTES);
            } else {
                const Float value = s * s * softplus;
                row[0] += value;
                row[1] += t ? value : Float{};
                row[2] += s;
                row[3] += t ? s : Float{};
                row[4] += t ? Float{} + 1.0f : Float{};
            }
        }
        for (int i = 0; i < SUMS; ++i) sums[i] += total(row[i]);
    }
    if (backward) {
        narrow(job, grad_top, grad + low * job.w);
        narrow(job, grad_bottom, grad + std::min(low + 1, job.h - 1) * job.w);
    } else {
        for (int i = 0; i < SUMS; ++i) job.sums[at + i * all] = sums[i];
    }
}

using Mask = void (*)(const Job&, int64_t, int64_t, std::vector<float>&);

void mask_128(const Job& job, int64_t s, int64_t p, std::vector<float>& memory) { run_mask<16>(job, s, p, memory); }

#if defined(__x86_64__)
SEGVIT_AVX2 void mask_256(const Job& job, int64_t s, int64_t p, std::vector<float>& memory) {
    run_mask<32>(job, s, p, memory);
}

SEGVIT_AVX512 void mask_512(const Job& job, int64_t s, int64_t p, std::vector<float>& memory) {
    run_mask<64>(job, s, p, memory);
}
#endif

Mask best_mask() {
#if defined(__x86_64__)
    if (widest() == Width::v512) return mask_512;
    if (widest() == Width::v256) return mask_256;
#endif
    return mask_128;
}

void run(const Job& job) {
    const Mask mask = best_mask();
    torch::stable::parallel_for(0, job.S * job.P, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> memory(4 * job.padded);
        for (int64_t unit = begin; unit < end; ++unit) mask(job, unit % job.S, unit / job.S, memory);
    });
}

Job make_job(const Tensor& mask_logits, const Tensor& labels, const Tensor& pairs, int64_t width, bool masked,
             double rows, double columns) {
    STD_TORCH_CHECK(
        mask_logits.dim() == 5 && mask_logits.scalar_type() == ScalarType::Float && mask_logits.is_contiguous(),
        "mask_loss: mask_logits must be [S, B, N, h, w], float32 and contiguous");
    STD_TORCH_CHECK(labels.dim() == 3 && labels.scalar_type() == ScalarType::Int && labels.is_contiguous() &&
                        labels.size(0) == mask_logits.size(1) && labels.size(2) % 16 == 0 && labels.size(2) >= width,
                    "mask_loss: labels must be [B, H, W padded to 16], int32 and contiguous");
    STD_TORCH_CHECK(pairs.dim() == 1 && pairs.scalar_type() == ScalarType::Long && pairs.is_contiguous(),
                    "mask_loss: pairs must be [P], int64 and contiguous");
    const int64_t B = mask_logits.size(1), N = mask_logits.size(2);
    const int64_t* pair = pairs.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < pairs.size(0); ++i)
        STD_TORCH_CHECK(pair[i] >= 0 && pair[i] < B * N, "mask_loss: there is no mask ", pair[i]);
    const int64_t h = mask_logits.size(3), w = mask_logits.size(4), height = labels.size(1), padded = labels.size(2);
    return Job{mask_logits.const_data_ptr<float>(),
               labels.const_data_ptr<int32_t>(),
               pair,
               mask_logits.size(0),
               B,
               N,
               h,
               w,
               pairs.size(0),
               height,
               width,
               padded,
               masked ? -1 : -2,
               Axis(h, height, rows, height),
               Axis(w, width, columns, padded)};
}

}  // namespace

void mask_loss_sums_cpu(Tensor mask_logits, Tensor labels, Tensor pairs, int64_t width, bool masked, double rows,
                        double columns, Tensor sums) {
    Job job = make_job(mask_logits, labels, pairs, width, masked, rows, columns);
    STD_TORCH_CHECK(sums.dim() == 3 && sums.size(0) == SUMS && sums.size(1) == job.S && sums.size(2) == job.P &&
                        sums.scalar_type() == ScalarType::Double && sums.is_contiguous(),
                    "mask_loss: sums must be [5, S, P], float64 and contiguous");
    job.sums = sums.mutable_data_ptr<double>();
    run(job);
}

void mask_loss_gradient_cpu(Tensor mask_logits, Tensor labels, Tensor pairs, int64_t width, bool masked, double rows,
                            double columns, Tensor coefficients, Tensor grad) {
    Job job = make_job(mask_logits, labels, pairs, width, masked, rows, columns);
    STD_TORCH_CHECK(coefficients.dim() == 3 && coefficients.size(0) == 4 && coefficients.size(1) == job.S &&
                        coefficients.size(2) == job.P && coefficients.scalar_type() == ScalarType::Float &&
                        coefficients.is_contiguous(),
                    "mask_loss: coefficients must be [4, S, P], float32 and contiguous");
    STD_TORCH_CHECK(
        grad.numel() == mask_logits.numel() && grad.scalar_type() == ScalarType::Float && grad.is_contiguous(),
        "mask_loss: grad must be like mask_logits");
    job.coefficients = coefficients.const_data_ptr<float>();
    job.grad = grad.mutable_data_ptr<float>();
    run(job);
}

}  // namespace segvit
