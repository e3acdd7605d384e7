// Shared by the CPU kernels of masks: sampling positions, and vectors of floats in GCC's and Clang's extension.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

#define SEGVIT_INLINE inline __attribute__((always_inline))

namespace segvit {

// Where output pixels look along one axis: two neighbouring cells and the weight of the second.
struct Axis {
    std::vector<int32_t> low, high;
    std::vector<float> weight;

    // align_corners=False; `padded` positions, those past `size` repeat the last
    Axis(int64_t cells, int64_t size, double extent, int64_t padded) : low(padded), high(padded), weight(padded) {
        for (int64_t i = 0; i < padded; ++i) {
            const double at = (static_cast<double>(std::min(i, size - 1)) + 0.5) * (extent / size) - 0.5;
            const double position = std::clamp(at, 0.0, static_cast<double>(cells - 1));
            low[i] = static_cast<int32_t>(position);
            high[i] = std::min<int32_t>(low[i] + 1, cells - 1);
            weight[i] = static_cast<float>(position - low[i]);
        }
    }
};

template <int BYTES>
struct Lanes {
    typedef float Float __attribute__((vector_size(BYTES)));
    typedef int32_t Int __attribute__((vector_size(BYTES)));
    static constexpr int64_t count = BYTES / 4;
};

// x becomes exp(-x): 0 or infinity where float32 has no such number.
template <typename Float, typename Int>
SEGVIT_INLINE void exp_negative(Float& x) {
    Float t = x * -1.44269504089f;          // 2^t = exp(-x)
    t = t > 128.0f ? Float{} + 128.0f : t;  // 2^128 is infinity
    t = t < -126.0f ? Float{} - 126.0f : t;
    const Int whole = __builtin_convertvector(t + 126.5f, Int) - 126;
    const Float r = t - __builtin_convertvector(whole, Float);  // |r| <= 1/2: the series ends within 1.2e-7
    Float e = r * 1.54035304e-4f + 1.33335581e-3f;
    e = e * r + 9.61812911e-3f;
    e = e * r + 5.55041087e-2f;
    e = e * r + 2.40226507e-1f;
    e = e * r + 6.93147181e-1f;
    e = e * r + 1.0f;
    x = (Float)((Int)e + (whole << 23));
}

template <typename Float, typename Int>
SEGVIT_INLINE void sigmoid(Float& x) {
    exp_negative<Float, Int>(x);
    x = 1.0f / (1.0f + x);
}

enum class Width { v128, v256, v512 };

// The widest vectors that this processor has instructions for; SEGVIT_VECTORS=128 or 256 asks for less, for tests.
inline Width widest() {
    const char* asked = std::getenv("SEGVIT_VECTORS");
    const int most = asked ? std::atoi(asked) : 512;
    if (most < 256) return Width::v128;
#if defined(__x86_64__)
    if (most >= 512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return Width::v512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Width::v256;
#endif
    return Width::v128;
}

}  // namespace segvit

#define SEGVIT_AVX2 __attribute__((target("avx2,fma")))
#define SEGVIT_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
