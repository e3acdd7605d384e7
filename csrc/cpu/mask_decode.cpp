// mask_decode on the CPU: interpolation, sigmoid, contraction and argmax in one pass over the output's pixels. The
// formula is in segvit/ops/reference/mask_decode.py. Pixels lie in the lanes of vectors; a tile of pixels goes through
// blocks of classes, and for labels the likeliest classes come first: once every pixel's best score is above what any
// class of the next block can reach in this tile, the rest cannot win and is left out. That is exact.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "../ops.h"
#include "vectors.h"

namespace segvit {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t TILE_ROWS = 16, TILE_COLUMNS = 256;
constexpr float BOUND_SLACK = 1 + 1.0f / 4096;  // of a class's largest score, for rounding of up to 1024 terms

struct Job {
    const float *logits, *probs;  // [B, N, h, w] and [B, N, K]
    int64_t N, K, h, w, height, width;
    float prune;
    Axis rows, columns;
    // labels, where `scores` is null
    char* labels = nullptr;   // [B, H, W]
    int64_t label_bytes = 0;  // of one label
    float* best = nullptr;    // [B, H, W], or null
    // scores
    float* scores = nullptr;  // [B, K, H, W] with these strides, the last one 1
    int64_t image_stride = 0, class_stride = 0, row_stride = 0;
    bool add = false;
};

// One thread's memory.
struct Scratch {
    std::vector<float> memory;
    float *top, *bottom, *masks, *packed, *largest, *bounds;  // 64-byte aligned
    std::vector<int32_t> order;                               // classes, the likeliest first
    std::vector<int64_t> kept;                                // queries

    Scratch(int64_t N, int64_t K, int64_t pixels, int64_t classes) : order(K) {
        const int64_t packed_size = (K + classes - 1) / classes * classes * N;
        const int64_t sizes[] = {N * pixels, N * pixels, N * pixels, packed_size, N, K};
        float** parts[] = {&top, &bottom, &masks, &packed, &largest, &bounds};
        auto rounded = [](int64_t size) { return (size + 15) / 16 * 16; };
        int64_t total = 16;
        for (int64_t size : sizes) total += rounded(size);
        memory.resize(total);
        void* start = memory.data();
        size_t space = total * sizeof(float);
        float* next = static_cast<float*>(std::align(64, sizeof(float), start, space));
        for (int i = 0; i < 6; ++i) {
            *parts[i] = next;
            next += rounded(sizes[i]);
        }
    }
};

void keep_queries(const Job& job, const float* probs, std::vector<int64_t>& kept) {
    kept.clear();
    for (int64_t n = 0; n < job.N; ++n) {
        const float* row = probs + n * job.K;
        if (job.prune <= 0 || *std::max_element(row, row + job.K) >= job.prune) kept.push_back(n);
    }
}

// Bounds of every class's score in a tile, and the classes in descending order of them.
template <typename L>
SEGVIT_INLINE void order_classes(const Job& job, const float* logits, const float* probs, int64_t y0, int64_t y1,
                                 int64_t x0, int64_t x1, Scratch& s) {
    using Float = typename L::Float;
    const int64_t N = static_cast<int64_t>(s.kept.size());
    for (int64_t n = 0; n < N; ++n) {
        const float* grid = logits + s.kept[n] * job.h * job.w;
        float most = -std::numeric_limits<float>::infinity();
        for (int64_t i = job.rows.low[y0]; i <= job.rows.high[y1 - 1]; ++i)
            for (int64_t j = job.columns.low[x0]; j <= job.columns.high[x1 - 1]; ++j)
                most = std::max(most, grid[i * job.w + j]);
        Float value = Float{} + most;
        sigmoid<Float, typename L::Int>(value);
        s.largest[n] = value[0];
    }
    std::fill(s.bounds, s.bounds + job.K, 0.0f);
    for (int64_t n = 0; n < N; ++n) {
        const float* row = probs + s.kept[n] * job.K;
        const float most = s.largest[n];
        for (int64_t c = 0; c < job.K; ++c) s.bounds[c] += std::max(row[c], 0.0f) * most;
    }
    std::iota(s.order.begin(), s.order.end(), 0);
    std::sort(s.order.begin(), s.order.end(),
              [&](int32_t a, int32_t b) { return s.bounds[a] > s.bounds[b] || (s.bounds[a] == s.bounds[b] && a < b); });
}

// A horizontally interpolated row of cells, [queries][pixels].
template <int64_t PIXELS>
SEGVIT_INLINE void widen(const Job& job, const float* logits, int64_t row, int64_t x0, const std::vector<int64_t>& kept,
                         float* out) {
    const int32_t *low = &job.columns.low[x0], *high = &job.columns.high[x0];
    const float* weight = &job.columns.weight[x0];
    for (size_t n = 0; n < kept.size(); ++n) {
        const float* cells = logits + (kept[n] * job.h + row) * job.w;
        for (int64_t x = 0; x < PIXELS; ++x)
            out[n * PIXELS + x] = cells[low[x]] + weight[x] * (cells[high[x]] - cells[low[x]]);
    }
}

template <typename T>
SEGVIT_INLINE void copy_labels(const int32_t* winner, int64_t count, char* to) {
    for (int64_t x = 0; x < count; ++x) reinterpret_cast<T*>(to)[x] = static_cast<T>(winner[x]);
}

void write_labels(const Job& job, const int32_t* winner, const float* best, int64_t count, int64_t at) {
    char* to = job.labels + at * job.label_bytes;
    switch (job.label_bytes) {
        case 1:
            copy_labels<uint8_t>(winner, count, to);
            break;
        case 2:
            copy_labels<int16_t>(winner, count, to);
            break;
        case 4:
            copy_labels<int32_t>(winner, count, to);
            break;
        default:
            copy_labels<int64_t>(winner, count, to);
    }
    if (job.best) std::memcpy(job.best + at, best, count * sizeof(float));
}

void write_scores(const Job& job, const float* score, int64_t count, float* to) {
    if (job.add)
        for (int64_t x = 0; x < count; ++x) to[x] += score[x];
    else
        std::memcpy(to, score, count * sizeof(float));
}

// One tile of one image: rows y0..y1, columns x0..x1.
template <int BYTES, int CLASSES, bool labels>
SEGVIT_INLINE void decode_tile(const Job& job, int64_t image, int64_t y0, int64_t y1, int64_t x0, int64_t x1,
                               Scratch& s) {
    using L = Lanes<BYTES>;
    using Float = typename L::Float;
    using Int = typename L::Int;
    constexpr int64_t LANES = L::count, PIXELS = 2 * LANES;
    const float* logits = job.logits + image * job.N * job.h * job.w;
    const float* probs = job.probs + image * job.N * job.K;
    keep_queries(job, probs, s.kept);
    const int64_t N = static_cast<int64_t>(s.kept.size()), blocks = (job.K + CLASSES - 1) / CLASSES;
    if (labels)
        order_classes<L>(job, logits, probs, y0, y1, x0, x1, s);
    else
        std::iota(s.order.begin(), s.order.end(), 0);
    int64_t packed_blocks = 0;
    for (int64_t x = x0; x < x1; x += PIXELS) {
        const int64_t count = std::min(PIXELS, job.width - x);
        int64_t low = -1;
        for (int64_t y = y0; y < y1; ++y) {
            if (job.rows.low[y] != low) {
                low = job.rows.low[y];
                widen<PIXELS>(job, logits, low, x, s.kept, s.top);
                widen<PIXELS>(job, logits, job.rows.high[y], x, s.kept, s.bottom);
            }
            const float weight = job.rows.weight[y];
            for (int64_t i = 0; i < N * PIXELS; i += LANES) {
                Float value, other;
                std::memcpy(&value, s.top + i, BYTES);
                std::memcpy(&other, s.bottom + i, BYTES);
                value += weight * (other - value);
                sigmoid<Float, Int>(value);
                std::memcpy(s.masks + i, &value, BYTES);
            }
            // in memory, not in registers, which the contraction needs for itself
            alignas(64) float best[PIXELS];
            alignas(64) int32_t winner[PIXELS];
            std::fill(best, best + PIXELS, -std::numeric_limits<float>::infinity());
            std::fill(winner, winner + PIXELS, 0);
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t first = block * CLASSES;
                if (labels && block > 0) {
                    const float bound = s.bounds[s.order[first]] * BOUND_SLACK;
                    int32_t any = 0;
                    for (int64_t lane = 0; lane < PIXELS; ++lane) any |= best[lane] <= bound;
                    if (!any) break;
                }
                const int64_t classes = std::min<int64_t>(CLASSES, job.K - first);
                float* packed = s.packed + first * N;  // [N][CLASSES]
                if (block == packed_blocks) {
                    for (int64_t n = 0; n < N; ++n)
                        for (int64_t c = 0; c < CLASSES; ++c)
                            packed[n * CLASSES + c] = c < classes ? probs[s.kept[n] * job.K + s.order[first + c]] : 0;
                    ++packed_blocks;
                }
                __asm__ volatile("" : : "r"(best), "r"(winner) : "memory");
                Float acc[CLASSES][2] = {};
                for (int64_t n = 0; n < N; ++n) {
                    Float m0, m1;
                    std::memcpy(&m0, s.masks + n * PIXELS, BYTES);
                    std::memcpy(&m1, s.masks + n * PIXELS + LANES, BYTES);
                    const float* p = packed + n * CLASSES;
#pragma GCC unroll 16
                    for (int c = 0; c < CLASSES; ++c) {
                        acc[c][0] += p[c] * m0;
                        acc[c][1] += p[c] * m1;
                    }
                }
                alignas(64) float score[CLASSES][PIXELS];
                std::memcpy(score, acc, sizeof(score));
                for (int64_t c = 0; c < classes; ++c) {
                    const int32_t id = s.order[first + c];
                    if (labels) {
                        for (int64_t lane = 0; lane < PIXELS; lane += LANES) {
                            Float value, most;
                            Int who;
                            std::memcpy(&value, score[c] + lane, BYTES);
                            std::memcpy(&most, best + lane, BYTES);
                            std::memcpy(&who, winner + lane, BYTES);
                            // one select after the other: GCC takes masks that are combined apart lane by lane
                            const Int lower = who < id ? who : Int{} + id;
                            who = value == most ? lower : who;
                            who = value > most ? Int{} + id : who;
                            most = value > most ? value : most;
                            std::memcpy(best + lane, &most, BYTES);
                            std::memcpy(winner + lane, &who, BYTES);
                        }
                    } else {
                        write_scores(
                            job, score[c], count,
                            job.scores + image * job.image_stride + id * job.class_stride + y * job.row_stride + x);
                    }
                }
            }
            if (labels) write_labels(job, winner, best, count, (image * job.height + y) * job.width + x);
        }
    }
}

// The same code for three generations of processors: vector width in bytes, and classes a block so that their
// accumulators stay in registers.
using Tile = void (*)(const Job&, int64_t, int64_t, int64_t, int64_t, int64_t, Scratch&);

template <bool labels>
void tile_128(const Job& job, int64_t b, int64_t y0, int64_t y1, int64_t x0, int64_t x1, Scratch& s) {
    decode_tile<16, 6, labels>(job, b, y0, y1, x0, x1, s);
}

struct Variant {
    Tile tile;
    int64_t pixels, classes;
};

#if defined(__x86_64__)
template <bool labels>
SEGVIT_AVX2 void tile_256(const Job& job, int64_t b, int64_t y0, int64_t y1, int64_t x0, int64_t x1, Scratch& s) {
    decode_tile<32, 6, labels>(job, b, y0, y1, x0, x1, s);
}

template <bool labels>
SEGVIT_AVX512 void tile_512(const Job& job, int64_t b, int64_t y0, int64_t y1, int64_t x0, int64_t x1, Scratch& s) {
    decode_tile<64, 12, labels>(job, b, y0, y1, x0, x1, s);
}
#endif

template <bool labels>
Variant best_variant() {
#if defined(__x86_64__)
    if (widest() == Width::v512) return {tile_512<labels>, 32, 12};
    if (widest() == Width::v256) return {tile_256<labels>, 16, 6};
#endif
    return {tile_128<labels>, 8, 6};
}

void decode(const Job& job, int64_t images) {
    const Variant variant = job.scores ? best_variant<false>() : best_variant<true>();
    const int64_t bands = (job.height + TILE_ROWS - 1) / TILE_ROWS;
    const int64_t strips = (job.width + TILE_COLUMNS - 1) / TILE_COLUMNS;
    torch::stable::parallel_for(0, images * bands * strips, 1, [&](int64_t begin, int64_t end) {
        Scratch scratch(job.N, job.K, variant.pixels, variant.classes);
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t y0 = unit / strips % bands * TILE_ROWS, x0 = unit % strips * TILE_COLUMNS;
            variant.tile(job, unit / strips / bands, y0, std::min(y0 + TILE_ROWS, job.height), x0,
                         std::min(x0 + TILE_COLUMNS, job.width), scratch);
        }
    });
}

Job make_job(const Tensor& mask_logits, const Tensor& class_probs, int64_t height, int64_t width, double prune,
             double rows, double columns) {
    for (const Tensor* t : {&mask_logits, &class_probs})
        STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous(),
                        "mask_decode: mask_logits and class_probs must be float32 and contiguous");
    STD_TORCH_CHECK(mask_logits.dim() == 4 && class_probs.dim() == 3 && mask_logits.size(0) == class_probs.size(0) &&
                        mask_logits.size(1) == class_probs.size(1),
                    "mask_decode: mask_logits must be [B, N, h, w] and class_probs [B, N, K]");
    const int64_t N = mask_logits.size(1), h = mask_logits.size(2), w = mask_logits.size(3);
    const int64_t padded = (width + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS;
    return Job{mask_logits.const_data_ptr<float>(),
               class_probs.const_data_ptr<float>(),
               N,
               class_probs.size(2),
               h,
               w,
               height,
               width,
               static_cast<float>(prune),
               Axis(h, height, rows, height),
               Axis(w, width, columns, padded)};
}

}  // namespace

void mask_decode_labels_cpu(Tensor mask_logits, Tensor class_probs, Tensor labels, Tensor best, double prune,
                            double rows, double columns) {
    const ScalarType kind = labels.scalar_type();
    STD_TORCH_CHECK(labels.dim() == 3 && labels.is_contiguous() && labels.size(0) == mask_logits.size(0) &&
                        kind != ScalarType::Float && kind != ScalarType::Double && kind != ScalarType::Half &&
                        kind != ScalarType::BFloat16,
                    "mask_decode: labels must be [B, H, W], integers and contiguous");
    STD_TORCH_CHECK(best.numel() == 0 || (best.numel() == labels.numel() && best.is_contiguous() &&
                                          best.scalar_type() == ScalarType::Float),
                    "mask_decode: best must be [B, H, W] float32, or empty");
    Job job = make_job(mask_logits, class_probs, labels.size(1), labels.size(2), prune, rows, columns);
    job.labels = static_cast<char*>(labels.data_ptr());
    job.label_bytes = labels.element_size();
    job.best = best.numel() ? best.mutable_data_ptr<float>() : nullptr;
    decode(job, labels.size(0));
}

void mask_decode_scores_cpu(Tensor mask_logits, Tensor class_probs, Tensor scores, bool add, double prune, double rows,
                            double columns) {
    STD_TORCH_CHECK(scores.dim() == 4 && scores.scalar_type() == ScalarType::Float && scores.stride(3) == 1 &&
                        scores.size(0) == mask_logits.size(0) && scores.size(1) == class_probs.size(2),
                    "mask_decode: scores must be [B, K, H, W] float32 with contiguous rows");
    Job job = make_job(mask_logits, class_probs, scores.size(2), scores.size(3), prune, rows, columns);
    job.scores = scores.mutable_data_ptr<float>();
    job.image_stride = scores.stride(0);
    job.class_stride = scores.stride(1);
    job.row_stride = scores.stride(2);
    job.add = add;
    decode(job, scores.size(0));
}

}  // namespace segvit
