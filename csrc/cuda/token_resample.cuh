// The kernels of token_downsample and token_upsample for NVIDIA GPUs. The formulas are in
// segvit/ops/reference/token_resample.py; sums are float32.
//
// One pass: a row of a tensor (a token) lies in the registers of one, two or four warps while its LayerNorm is taken,
// and goes from there to every place it was gathered to. Accesses are 16 bytes wide where rows allow it. Sums over
// tokens have a fixed order: the same GPU gives the same bits.
#pragma once

#include <climits>
#include <cstdint>
#include <type_traits>

namespace segvit {
namespace cuda {

constexpr int WARPS = 4, THREADS = 32 * WARPS;  // of a block
constexpr int SCALAR = 16;                      // channels of a thread where 16-byte packs do not fit
constexpr int END = -1;                         // of a list of places

// How a row of so many channels lies in registers: channels of a pack, packs of a thread, warps. 16-byte packs where
// rows allow it, and as few warps as hold the row; no packs where none do.
struct Layout {
    int vec, packs, warps;
};

inline Layout layout(int64_t channels, int element_bytes) {
    const int wide = 16 / element_bytes;
    const bool packed = channels % wide == 0;
    const int64_t warp = 32 * (packed ? 4 * wide : SCALAR);  // channels of one, with the usual packs
    int warps = 1;
    while (warps < WARPS && channels > warp * warps) warps *= 2;
    if (!packed) return {1, channels <= warp * warps ? SCALAR : 0, warps};
    const int64_t packs = (channels + 32 * wide * warps - 1) / (32 * wide * warps);
    if (packs <= 4) return {wide, static_cast<int>(packs), warps};
    return {wide, element_bytes == 4 && packs <= 8 ? 8 : 0, warps};  // 8 packs of float32 at most
}

// Calls with the layout's numbers of channels and packs as constants.
template <typename T, typename F>
void with_layout(const Layout& l, F&& call) {
    constexpr int VEC = 16 / sizeof(T);
    if (l.vec == 1) return call(std::integral_constant<int, 1>{}, std::integral_constant<int, SCALAR>{});
    using Vec = std::integral_constant<int, VEC>;
    if (l.packs == 1) return call(Vec{}, std::integral_constant<int, 1>{});
    if (l.packs == 2) return call(Vec{}, std::integral_constant<int, 2>{});
    if (l.packs == 3) return call(Vec{}, std::integral_constant<int, 3>{});
    if constexpr (sizeof(T) == 4)
        if (l.packs == 8) return call(Vec{}, std::integral_constant<int, 8>{});
    call(Vec{}, std::integral_constant<int, 4>{});
}

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T value[N];
};

// The pack at column c of a row of C columns.
template <int N, typename T>
__device__ Pack<T, N> load(const T* rows, int row, int C, int c) {
    return *reinterpret_cast<const Pack<T, N>*>(rows + static_cast<int64_t>(row) * C + c);
}

template <int N, typename T>
__device__ void store(T* rows, int row, int C, int c, const Pack<T, N>& pack) {
    *reinterpret_cast<Pack<T, N>*>(rows + static_cast<int64_t>(row) * C + c) = pack;
}

// The grid and, for every token, where it was gathered to: arithmetic for an even grid, else lists that `link` made.
struct Places {
    int prefix, width, stride, low_width, kept, tokens;
    const int *head, *next;  // [B, tokens], [B, prefix + kept]; null for an even grid

    __device__ int first(int b, int t) const {
        if (head) return head[b * tokens + t] == INT_MAX ? END : head[b * tokens + t];
        if (t < prefix) return t;
        const int row = (t - prefix) / width, column = (t - prefix) % width;
        if (row % stride || column % stride) return END;
        return prefix + row / stride * low_width + column / stride;
    }

    __device__ int after(int b, int place) const { return next ? next[b * (prefix + kept) + place] : END; }
};

// The places of every token as lists in rising order, from the cells of an index [B, kept]: head and last [B, tokens],
// next [B, prefix + kept]. One block an image. Without a list, tokens have head INT_MAX and last -1.
__global__ void link(const int64_t* index, int prefix, int kept, int tokens, int* head, int* last, int* next) {
    const int64_t b = blockIdx.x;
    const int places = prefix + kept;
    head += b * tokens, last += b * tokens, next += b * places, index += b * kept;
    auto token = [&](int place) { return place < prefix ? place : prefix + static_cast<int>(index[place - prefix]); };
    for (int t = threadIdx.x; t < tokens; t += blockDim.x) {
        head[t] = INT_MAX;
        last[t] = -1;
    }
    __syncthreads();
    for (int place = threadIdx.x; place < places; place += blockDim.x) {
        if (place >= prefix) assert(index[place - prefix] >= 0 && index[place - prefix] < tokens - prefix);
        atomicMin(head + token(place), place);
        atomicMax(last + token(place), place);
    }
    __syncthreads();
    for (int place = threadIdx.x; place < places; place += blockDim.x) {
        int following = END;
        if (last[token(place)] != place)  // rare: the same cell comes again
            for (following = place + 1; token(following) != token(place);) ++following;
        next[place] = following;
    }
}

// Sums over a row of two values that every thread has; the row's threads are `warps` neighbouring warps. Successive
// calls must use different buffers, and all threads of the block must call when warps > 1.
__device__ inline void sum_over_row(float& a, float& b, int warps, float (*buffer)[2]) {
    for (int mask = 16; mask; mask /= 2) {
        a += __shfl_xor_sync(0xffffffffu, a, mask);
        b += __shfl_xor_sync(0xffffffffu, b, mask);
    }
    if (warps == 1) return;
    const int warp = threadIdx.x / 32, first = warp / warps * warps;
    if (threadIdx.x % 32 == 0) buffer[warp][0] = a, buffer[warp][1] = b;
    __syncthreads();
    a = b = 0;
    for (int i = first; i < first + warps; ++i) a += buffer[i][0], b += buffer[i][1];
}

// LayerNorm of rows [B * tokens, C], and copies of the kept ones. A thread has NV packs of VEC neighbouring channels.
template <typename T, int VEC, int NV>
__global__ void __launch_bounds__(THREADS, 3)
    downsample_forward(const T* x, const T* weight, const T* bias, Places places, int rows, int C, float eps, int warps,
                       T* y, T* y_q, T* x_q, float* mean, float* rstd) {
    using Packed = Pack<T, VEC>;
    __shared__ float buffers[2][WARPS][2];
    const int slots = WARPS / warps, slot = threadIdx.x / 32 / warps, lane = threadIdx.x % (32 * warps);
    const int step = 32 * warps * VEC;
    for (int base = blockIdx.x * slots; base < rows; base += gridDim.x * slots) {
        const int row = base + slot;
        const bool active = row < rows;
        Packed in[NV];
        float sum = 0, unused = 0;
#pragma unroll
        for (int i = 0; i < NV; ++i) {
            const int c = i * step + lane * VEC;
            if (!active || c >= C) continue;
            in[i] = load<VEC>(x, row, C, c);
#pragma unroll
            for (int j = 0; j < VEC; ++j) sum += static_cast<float>(in[i].value[j]);
        }
        sum_over_row(sum, unused, warps, buffers[0]);
        const float m = sum / C;
        float square = 0;
#pragma unroll
        for (int i = 0; i < NV; ++i) {
            if (!active || i * step + lane * VEC >= C) continue;
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                const float d = static_cast<float>(in[i].value[j]) - m;
                square += d * d;
            }
        }
        sum_over_row(square, unused, warps, buffers[1]);
        if (!active) continue;  // only after both sums, at which the whole block meets
        const float r = 1.0f / sqrtf(square / C + eps);
        if (lane == 0) mean[row] = m, rstd[row] = r;
        const int b = row / places.tokens, t = row % places.tokens, to_image = places.prefix + places.kept;
        const int first = places.first(b, t);
#pragma unroll
        for (int i = 0; i < NV; ++i) {
            const int c = i * step + lane * VEC;
            if (c >= C) continue;
            const Packed w = load<VEC>(weight, 0, C, c), shift = load<VEC>(bias, 0, C, c);
            Packed out;
#pragma unroll
            for (int j = 0; j < VEC; ++j)
                out.value[j] =
                    static_cast<T>((static_cast<float>(in[i].value[j]) - m) * r * static_cast<float>(w.value[j]) +
                                   static_cast<float>(shift.value[j]));
            store<VEC>(y, row, C, c, out);
            for (int place = first; place != END; place = places.after(b, place)) {
                store<VEC>(y_q, b * to_image + place, C, c, out);
                store<VEC>(x_q, b * to_image + place, C, c, in[i]);
            }
        }
    }
}

// The gradient of x, and what each block adds to those of weight and bias: partial [blocks, 2, C].
template <typename T, int VEC, int NV>
__global__ void __launch_bounds__(THREADS, 2)
    downsample_backward(const T* grad_y, const T* grad_y_q, const T* grad_x_q, const T* x, const T* weight,
                        const float* mean, const float* rstd, Places places, int rows, int C, int warps, T* grad_x,
                        float* partial) {
    using Packed = Pack<T, VEC>;
    __shared__ float buffers[2][WARPS][2];
    __shared__ float columns[2][THREADS * VEC * NV];
    const int slots = WARPS / warps, slot = threadIdx.x / 32 / warps, lane = threadIdx.x % (32 * warps);
    const int step = 32 * warps * VEC, to_image = places.prefix + places.kept;
    float gw[NV][VEC] = {}, gb[NV][VEC] = {};
    int turn = 0;
    for (int base = blockIdx.x * slots; base < rows; base += gridDim.x * slots, turn ^= 1) {
        const int row = base + slot;
        const bool active = row < rows;
        const int b = row / places.tokens, first = active ? places.first(b, row % places.tokens) : END;
        const float m = active ? mean[row] : 0, r = active ? rstd[row] : 0;
        Packed in[NV];
        float g[NV][VEC], sum = 0, dot = 0;
#pragma unroll
        for (int i = 0; i < NV; ++i) {
            const int c = i * step + lane * VEC;
            if (!active || c >= C) continue;
            in[i] = load<VEC>(x, row, C, c);
            const Packed upstream = load<VEC>(grad_y, row, C, c);
#pragma unroll
            for (int j = 0; j < VEC; ++j) g[i][j] = static_cast<float>(upstream.value[j]);
        }
        for (int place = first; place != END; place = places.after(b, place)) {
#pragma unroll
            for (int i = 0; i < NV; ++i) {
                const int c = i * step + lane * VEC;
                if (c >= C) continue;
                const Packed more = load<VEC>(grad_y_q, b * to_image + place, C, c);
#pragma unroll
                for (int j = 0; j < VEC; ++j) g[i][j] += static_cast<float>(more.value[j]);
            }
        }
#pragma unroll
        for (int i = 0; i < NV; ++i) {
            const int c = i * step + lane * VEC;
            if (!active || c >= C) continue;
            const Packed w = load<VEC>(weight, 0, C, c);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                const float hat = (static_cast<float>(in[i].value[j]) - m) * r;
                gw[i][j] += g[i][j] * hat;
                gb[i][j] += g[i][j];
                g[i][j] *= static_cast<float>(w.value[j]);
                sum += g[i][j];
                dot += g[i][j] * hat;
            }
        }
        sum_over_row(sum, dot, warps, buffers[turn]);
        if (!active) continue;
        sum /= C;
        dot /= C;
#pragma unroll
        for (int i = 0; i < NV; ++i) {
            const int c = i * step + lane * VEC;
            if (c >= C) continue;
#pragma unroll
            for (int j = 0; j < VEC; ++j)
                g[i][j] = (g[i][j] - sum - (static_cast<float>(in[i].value[j]) - m) * r * dot) * r;
            for (int place = first; place != END; place = places.after(b, place)) {
                const Packed more = load<VEC>(grad_x_q, b * to_image + place, C, c);
#pragma unroll
                for (int j = 0; j < VEC; ++j) g[i][j] += static_cast<float>(more.value[j]);
            }
            Packed out;
#pragma unroll
            for (int j = 0; j < VEC; ++j) out.value[j] = static_cast<T>(g[i][j]);
            store<VEC>(grad_x, row, C, c, out);
        }
    }
    for (int turn_of = 0; turn_of < slots; ++turn_of) {  // the block's slots add up one after another
        if (slot == turn_of) {
#pragma unroll
            for (int i = 0; i < NV; ++i) {
                const int c = i * step + lane * VEC;
                if (c >= C) continue;
#pragma unroll
                for (int j = 0; j < VEC; ++j) {
                    columns[0][c + j] = (turn_of ? columns[0][c + j] : 0.0f) + gw[i][j];
                    columns[1][c + j] = (turn_of ? columns[1][c + j] : 0.0f) + gb[i][j];
                }
            }
        }
        __syncthreads();
    }
    for (int c = threadIdx.x; c < C; c += THREADS) {
        partial[static_cast<int64_t>(blockIdx.x) * 2 * C + c] = columns[0][c];
        partial[(static_cast<int64_t>(blockIdx.x) * 2 + 1) * C + c] = columns[1][c];
    }
}

// Sums of partial [parts, 2, C] over parts: the gradients of weight and bias. A warp's threads have neighbouring
// columns; the block's warps share the parts.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    finish_weights(const float* partial, int parts, int C, T* grad_weight, T* grad_bias) {
    __shared__ float sums[WARPS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    float sum = 0;
    if (column < 2 * C)
        for (int part = warp; part < parts; part += WARPS) sum += partial[static_cast<int64_t>(part) * 2 * C + column];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp || column >= 2 * C) return;
    for (int i = 1; i < WARPS; ++i) sum += sums[i][lane];
    if (column < C)
        grad_weight[column] = static_cast<T>(sum);
    else
        grad_bias[column - C] = static_cast<T>(sum);
}

// The full grid behind `prefix` tokens, its even part, and the tokens of extra cells behind that.
struct Grid {
    int prefix, height, width, stride, low_height, low_width, extra;
    const int* last;  // [B, height * width], the place of a cell in extra, -1 where it is not there; null without extra

    __device__ int tokens() const { return prefix + height * width; }
    __device__ int kept() const { return low_height * low_width; }
    __device__ int length() const { return prefix + kept() + extra; }
    __device__ int place(int b, int cell) const { return last ? last[b * height * width + cell] : -1; }
};

// A warp a token: out = skip + the kept tokens between which the token lies.
template <typename T, int VEC>
__global__ void __launch_bounds__(THREADS, 4)
    upsample_forward(const T* x, const T* skip, Grid grid, int rows, int C, T* out) {
    using Packed = Pack<T, VEC>;
    for (int row = blockIdx.x * WARPS + threadIdx.x / 32; row < rows; row += gridDim.x * WARPS) {
        const int b = row / grid.tokens(), t = row % grid.tokens(), cell = t - grid.prefix;
        int from[4] = {t, t, t, t};
        float weight[4] = {1, 0, 0, 0};
        const int own = cell < 0 ? -1 : grid.place(b, cell);
        if (own >= 0) {
            from[0] = grid.prefix + grid.kept() + own;
        } else if (cell >= 0) {
            const int y = cell / grid.width, x_at = cell % grid.width;
            const int i = min(y / grid.stride, grid.low_height - 1), j = min(x_at / grid.stride, grid.low_width - 1);
            const int below = min(i + 1, grid.low_height - 1), right = min(j + 1, grid.low_width - 1);
            const float v = below == i ? 0.0f : static_cast<float>(y - i * grid.stride) / grid.stride;
            const float u = right == j ? 0.0f : static_cast<float>(x_at - j * grid.stride) / grid.stride;
            from[0] = grid.prefix + i * grid.low_width + j, weight[0] = (1 - v) * (1 - u);
            from[1] = grid.prefix + i * grid.low_width + right, weight[1] = (1 - v) * u;
            from[2] = grid.prefix + below * grid.low_width + j, weight[2] = v * (1 - u);
            from[3] = grid.prefix + below * grid.low_width + right, weight[3] = v * u;
        }
        for (int c = threadIdx.x % 32 * VEC; c < C; c += 32 * VEC) {
            Packed sum = load<VEC>(skip, row, C, c);
            float value[VEC];
#pragma unroll
            for (int j = 0; j < VEC; ++j) value[j] = static_cast<float>(sum.value[j]);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                if (weight[k] == 0) continue;
                const Packed tap = load<VEC>(x, b * grid.length() + from[k], C, c);
#pragma unroll
                for (int j = 0; j < VEC; ++j) value[j] += weight[k] * static_cast<float>(tap.value[j]);
            }
#pragma unroll
            for (int j = 0; j < VEC; ++j) sum.value[j] = static_cast<T>(value[j]);
            store<VEC>(out, row, C, c, sum);
        }
    }
}

// How much the full grid's row or column `at` took of the kept `low`.
__device__ inline float share(int at, int low, int kept, int stride) {
    const int distance = at > low * stride ? at - low * stride : low * stride - at;
    return low == kept - 1 && at >= low * stride ? 1.0f : static_cast<float>(stride - distance) / stride;
}

// A warp a kept token: its gradient is what the cells around took of it. Row 0 … prefix + kept + extra − 1 of an image.
template <typename T, int VEC>
__global__ void __launch_bounds__(THREADS, 4)
    upsample_backward(const T* grad, const int64_t* extra, Grid grid, int rows, int C, T* grad_x) {
    using Packed = Pack<T, VEC>;
    for (int row = blockIdx.x * WARPS + threadIdx.x / 32; row < rows; row += gridDim.x * WARPS) {
        const int b = row / grid.length(), place = row % grid.length(), k = place - grid.prefix;
        const T* full = grad + static_cast<int64_t>(b) * grid.tokens() * C;
        // cells y0 … y1, x0 … x1 took of it; a prefix token or one of extra gave itself to one token alone
        int y0 = 0, y1 = 0, x0 = 0, x1 = 0, alone = -1, i = 0, j = 0;
        if (k < 0) {
            alone = place;
        } else if (k >= grid.kept()) {
            const int e = k - grid.kept(), cell = static_cast<int>(extra[b * grid.extra + e]);
            if (grid.place(b, cell) == e)
                alone = grid.prefix + cell;
            else
                y1 = -1;  // another took its cell
        } else {
            i = k / grid.low_width, j = k % grid.low_width;
            y0 = max(0, (i - 1) * grid.stride + 1), y1 = min(grid.height - 1, (i + 1) * grid.stride - 1);
            x0 = max(0, (j - 1) * grid.stride + 1), x1 = min(grid.width - 1, (j + 1) * grid.stride - 1);
        }
        for (int c = threadIdx.x % 32 * VEC; c < C; c += 32 * VEC) {
            float value[VEC];
#pragma unroll
            for (int v = 0; v < VEC; ++v) value[v] = 0;
            for (int y = y0; y <= y1; ++y)
                for (int x = x0; x <= x1; ++x) {
                    const int cell = y * grid.width + x;
                    if (alone < 0 && grid.place(b, cell) >= 0) continue;
                    const float weight = alone >= 0 ? 1.0f
                                                    : share(y, i, grid.low_height, grid.stride) *
                                                          share(x, j, grid.low_width, grid.stride);
                    const int t = alone >= 0 ? alone : grid.prefix + cell;
                    const Packed tap = load<VEC>(full, t, C, c);
#pragma unroll
                    for (int v = 0; v < VEC; ++v) value[v] += weight * static_cast<float>(tap.value[v]);
                }
            Packed out;
#pragma unroll
            for (int v = 0; v < VEC; ++v) out.value[v] = static_cast<T>(value[v]);
            store<VEC>(grad_x, row, C, c, out);
        }
    }
}

}  // namespace cuda
}  // namespace segvit
