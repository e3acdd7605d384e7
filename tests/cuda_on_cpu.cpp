// Runs the kernels of csrc/cuda/token_resample.cuh on a CPU, one std::thread per CUDA thread and one block after
// another: slow, and for tests of the arithmetic alone. What CUDA gives a kernel is defined here in C++.
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // of one block, for blocks run one after another
#define __launch_bounds__(...)

struct Dimension {
    int x;
};
thread_local Dimension threadIdx, blockIdx, blockDim, gridDim;
using std::max;
using std::min;

namespace {
std::unique_ptr<std::barrier<>> block_barrier;
std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
float exchanged[32][32];
}  // namespace

void __syncthreads() { block_barrier->arrive_and_wait(); }

float __shfl_xor_sync(unsigned, float value, int mask) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    exchanged[warp][lane] = value;
    warp_barriers[warp]->arrive_and_wait();
    const float other = exchanged[warp][lane ^ mask];
    warp_barriers[warp]->arrive_and_wait();
    return other;
}

template <typename Better>
void replace(int* at, int value, Better better) {
    std::atomic_ref<int> place(*at);
    for (int seen = place; better(value, seen) && !place.compare_exchange_weak(seen, value);) {
    }
}
void atomicMin(int* at, int value) { replace(at, value, std::less<>{}); }
void atomicMax(int* at, int value) { replace(at, value, std::greater<>{}); }

#include "../csrc/cuda/token_resample.cuh"

namespace {

using namespace segvit::cuda;
using BFloat16 = torch::headeronly::BFloat16;

template <typename Kernel>
void launch(int blocks, int threads, Kernel kernel) {
    for (int block = 0; block < blocks; ++block) {
        block_barrier = std::make_unique<std::barrier<>>(threads);
        warp_barriers.clear();
        for (int warp = 0; warp < threads / 32; ++warp) warp_barriers.push_back(std::make_unique<std::barrier<>>(32));
        std::vector<std::thread> running;
        for (int thread = 0; thread < threads; ++thread)
            running.emplace_back([=] {
                threadIdx = {thread}, blockIdx = {block}, blockDim = {threads}, gridDim = {blocks};
                kernel();
            });
        for (std::thread& one : running) one.join();
    }
}

Places even_or(const int* shape, const int* lists, int images) {
    const int prefix = shape[0], tokens = shape[5];
    return {prefix,   shape[1], shape[2], shape[3],
            shape[4], tokens,   lists,    lists ? lists + 2 * images * tokens : nullptr};
}

template <typename T>
void downsample(const T* x, const T* weight, const T* bias, const T* const* upstream, const int* shape,
                const int* lists, int images, int channels, float eps, int blocks, T* const* out, float* mean,
                float* rstd, float* partial, T* const* grads) {
    const Places places = even_or(shape, lists, images);
    const int rows = images * places.tokens;
    const Layout l = layout(channels, sizeof(T));
    with_layout<T>(l, [&](auto v, auto n) {
        launch(blocks, THREADS, [&] {
            downsample_forward<T, v.value, n.value>(x, weight, bias, places, rows, channels, eps, l.warps, out[0],
                                                    out[1], out[2], mean, rstd);
        });
        launch(blocks, THREADS, [&] {
            downsample_backward<T, v.value, n.value>(upstream[0], upstream[1], upstream[2], x, weight, mean, rstd,
                                                     places, rows, channels, l.warps, grads[0], partial);
        });
    });
    launch((2 * channels + 31) / 32, THREADS,
           [&] { finish_weights<T>(partial, blocks, channels, grads[1], grads[2]); });
}

template <typename T>
void upsample(const T* x, const T* skip, const T* upstream, const int* shape, const int* last, const int64_t* extra,
              int images, int channels, int blocks, T* out, T* grad_x) {
    const Grid grid{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6], last};
    auto both = [&](auto v) {
        launch(blocks, THREADS,
               [&] { upsample_forward<T, v.value>(x, skip, grid, images * grid.tokens(), channels, out); });
        launch(blocks, THREADS,
               [&] { upsample_backward<T, v.value>(upstream, extra, grid, images * grid.length(), channels, grad_x); });
    };
    if (channels * sizeof(T) % 16)
        both(std::integral_constant<int, 1>{});
    else
        both(std::integral_constant<int, 16 / sizeof(T)>{});
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) void

EXPORT link_places(const int64_t* index, int images, int prefix, int kept, int tokens, int* lists) {
    launch(images, 64,
           [&] { link(index, prefix, kept, tokens, lists, lists + images * tokens, lists + 2 * images * tokens); });
}

EXPORT layout_of(int channels, int element_bytes, int* found) {
    const Layout l = layout(channels, element_bytes);
    found[0] = l.vec, found[1] = l.packs, found[2] = l.warps;
}

#define EXPORT_FOR(T, SUFFIX)                                                                                          \
    EXPORT downsample_##SUFFIX(const T* x, const T* weight, const T* bias, const T* const* upstream, const int* shape, \
                               const int* lists, int images, int channels, float eps, int blocks, T* const* out,       \
                               float* mean, float* rstd, float* partial, T* const* grads) {                            \
        downsample(x, weight, bias, upstream, shape, lists, images, channels, eps, blocks, out, mean, rstd, partial,   \
                   grads);                                                                                             \
    }                                                                                                                  \
    EXPORT upsample_##SUFFIX(const T* x, const T* skip, const T* upstream, const int* shape, const int* last,          \
                             const int64_t* extra, int images, int channels, int blocks, T* out, T* grad_x) {          \
        upsample(x, skip, upstream, shape, last, extra, images, channels, blocks, out, grad_x);                        \
    }

EXPORT_FOR(float, f32)
EXPORT_FOR(BFloat16, bf16)
