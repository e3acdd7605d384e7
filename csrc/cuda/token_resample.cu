// token_downsample and token_upsample on CUDA: what is launched, and how large.
#undef NDEBUG  // a cell outside the grid is an assertion on the device
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cassert>

#include "../token_resample.h"
#include "token_resample.cuh"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace segvit {
namespace {

// Where a call runs: its device made current, the current stream, and the largest grid that is resident at once.
struct Launch {
    torch::stable::accelerator::DeviceGuard guard;
    cudaStream_t stream;
    int processors;

    explicit Launch(const Tensor& t) : guard(t.get_device()) {
        void* current = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &current));
        stream = static_cast<cudaStream_t>(current);
        succeed(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, t.get_device()));
    }

    static void succeed(cudaError_t error) {
        STD_TORCH_CHECK(error == cudaSuccess, "token_resample: CUDA says: ", cudaGetErrorString(error));
    }

    // Blocks for so many units of work, at most what is resident at once.
    template <typename Kernel>
    int blocks(Kernel kernel, int64_t units, int64_t per_block) const {
        int resident = 0;
        succeed(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, cuda::THREADS, 0));
        const int64_t most = static_cast<int64_t>(std::max(resident, 1)) * processors;
        return static_cast<int>(std::min((units + per_block - 1) / per_block, most));
    }
};

// The lists of an index [B, M]: head and last [B, tokens], next [B, prefix + M], one after another.
Tensor link_places(const Launch& launch, const Tensor& index, int64_t prefix, int64_t tokens) {
    const int64_t B = index.size(0), M = index.size(1);
    Tensor lists = torch::stable::new_empty(index, {B * (2 * tokens + prefix + M)}, ScalarType::Int);
    int* head = lists.mutable_data_ptr<int32_t>();
    cuda::link<<<B, 256, 0, launch.stream>>>(index.const_data_ptr<int64_t>(), prefix, M, tokens, head,
                                             head + B * tokens, head + 2 * B * tokens);
    Launch::succeed(cudaGetLastError());
    return lists;
}

cuda::Places places(const Shape& s, const Tensor* lists) {
    const int* head = lists ? lists->const_data_ptr<int32_t>() : nullptr;
    return {static_cast<int>(s.prefix),
            static_cast<int>(s.width),
            static_cast<int>(s.stride),
            static_cast<int>(s.low_width()),
            static_cast<int>(s.kept),
            static_cast<int>(s.tokens),
            head,
            head ? head + 2 * s.images * s.tokens : nullptr};
}

cuda::Grid grid_of(const Shape& s, const Index& extra, const Tensor* lists) {
    const int* last = lists ? lists->const_data_ptr<int32_t>() + s.images * s.height * s.width : nullptr;
    return {static_cast<int>(s.prefix),
            static_cast<int>(s.height),
            static_cast<int>(s.width),
            static_cast<int>(s.stride),
            static_cast<int>(s.low_height()),
            static_cast<int>(s.low_width()),
            extra ? static_cast<int>(extra->size(1)) : 0,
            last};
}

// Rows one after another, where packs of 16 bytes can be read.
Tensor in_order(const Tensor& t) {
    const Tensor rows = torch::stable::contiguous(t);
    return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 ? torch::stable::clone(rows) : rows;
}

// Refuses rows that fit no layout, and what would not fit the kernels' 32-bit places.
cuda::Layout checked_layout(const Shape& s, const Tensor& x) {
    const cuda::Layout found = cuda::layout(s.channels, static_cast<int>(x.element_size()));
    STD_TORCH_CHECK(found.packs > 0, "token_downsample: ", s.channels, " channels are too many for the CUDA kernel");
    return found;
}

void check_size(const Shape& s, int64_t extra = 0) {
    STD_TORCH_CHECK(s.images * (std::max(s.tokens, s.prefix + s.kept) + extra) < (int64_t{1} << 30),
                    "token_resample: more than 2^30 tokens");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_downsample_cuda(Tensor x, Tensor weight, Tensor bias,
                                                                         Index index, int64_t height, int64_t width,
                                                                         int64_t stride, double eps) {
    const Shape s = downsample_shape(x, weight, index, height, width, stride);
    check_like(x, bias, {s.channels}, x.scalar_type());
    check_size(s);
    const cuda::Layout l = checked_layout(s, x);
    const Launch launch(x);
    for (Tensor* t : {&x, &weight, &bias}) *t = in_order(*t);
    const int64_t B = s.images, T = s.tokens, C = s.channels, Q = s.prefix + s.kept, rows = B * T;
    Tensor y = torch::stable::new_empty(x, {B, T, C}), y_q = torch::stable::new_empty(x, {B, Q, C});
    Tensor x_q = torch::stable::new_empty(x, {B, Q, C});
    Tensor mean = torch::stable::new_empty(x, {B, T}, ScalarType::Float);
    Tensor rstd = torch::stable::new_empty(x, {B, T}, ScalarType::Float);
    const Index lists =
        index ? Index(link_places(launch, torch::stable::contiguous(*index), s.prefix, T)) : std::nullopt;
    dispatch_half(x.scalar_type(), "token_downsample", [&](auto tag) {
        using T_ = decltype(tag);
        cuda::with_layout<T_>(l, [&](auto vec, auto packs) {
            auto* kernel = &cuda::downsample_forward<T_, vec.value, packs.value>;
            const int blocks = launch.blocks(kernel, rows, cuda::WARPS / l.warps);
            kernel<<<blocks, cuda::THREADS, 0, launch.stream>>>(
                x.const_data_ptr<T_>(), weight.const_data_ptr<T_>(), bias.const_data_ptr<T_>(),
                places(s, lists ? &*lists : nullptr), rows, C, static_cast<float>(eps), l.warps,
                y.mutable_data_ptr<T_>(), y_q.mutable_data_ptr<T_>(), x_q.mutable_data_ptr<T_>(),
                mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>());
            Launch::succeed(cudaGetLastError());
        });
    });
    return {y, y_q, x_q, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> token_downsample_backward_cuda(Tensor grad_y, Tensor grad_y_q, Tensor grad_x_q,
                                                                  Tensor x, Tensor weight, Index index, Tensor mean,
                                                                  Tensor rstd, int64_t height, int64_t width,
                                                                  int64_t stride) {
    const Shape s = downsample_shape(x, weight, index, height, width, stride);
    check_gradients(s, x, grad_y, grad_y_q, grad_x_q, mean, rstd, ScalarType::Float);
    check_size(s);
    const cuda::Layout l = checked_layout(s, x);
    const Launch launch(x);
    for (Tensor* t : {&grad_y, &grad_y_q, &grad_x_q, &x, &weight, &mean, &rstd}) *t = in_order(*t);
    const int64_t C = s.channels, rows = s.images * s.tokens;
    Tensor grad_x = torch::stable::new_empty(x, {s.images, s.tokens, C});
    Tensor grad_weight = torch::stable::new_empty(x, {C}), grad_bias = torch::stable::new_empty(x, {C});
    const Index lists =
        index ? Index(link_places(launch, torch::stable::contiguous(*index), s.prefix, s.tokens)) : std::nullopt;
    dispatch_half(x.scalar_type(), "token_downsample_backward", [&](auto tag) {
        using T_ = decltype(tag);
        cuda::with_layout<T_>(l, [&](auto vec, auto packs) {
            auto* kernel = &cuda::downsample_backward<T_, vec.value, packs.value>;
            const int blocks = launch.blocks(kernel, rows, cuda::WARPS / l.warps);
            Tensor partial = torch::stable::new_empty(x, {blocks, 2, C}, ScalarType::Float);
            kernel<<<blocks, cuda::THREADS, 0, launch.stream>>>(
                grad_y.const_data_ptr<T_>(), grad_y_q.const_data_ptr<T_>(), grad_x_q.const_data_ptr<T_>(),
                x.const_data_ptr<T_>(), weight.const_data_ptr<T_>(), mean.const_data_ptr<float>(),
                rstd.const_data_ptr<float>(), places(s, lists ? &*lists : nullptr), rows, C, l.warps,
                grad_x.mutable_data_ptr<T_>(), partial.mutable_data_ptr<float>());
            Launch::succeed(cudaGetLastError());
            cuda::finish_weights<T_><<<(2 * C + 31) / 32, cuda::THREADS, 0, launch.stream>>>(
                partial.const_data_ptr<float>(), blocks, C, grad_weight.mutable_data_ptr<T_>(),
                grad_bias.mutable_data_ptr<T_>());
            Launch::succeed(cudaGetLastError());
        });
    });
    return {grad_x, grad_weight, grad_bias};
}

Tensor token_upsample_cuda(Tensor x, Tensor skip, Index extra, int64_t height, int64_t width, int64_t stride) {
    const Shape s = upsample_shape(x, skip, extra, height, width, stride);
    check_size(s, extra ? extra->size(1) : 0);
    const Launch launch(skip);
    x = in_order(x);
    skip = in_order(skip);
    const int64_t C = s.channels, rows = s.images * s.tokens;
    Tensor out = torch::stable::new_empty(skip, {s.images, s.tokens, C});
    const Index lists =
        extra ? Index(link_places(launch, torch::stable::contiguous(*extra), 0, height * width)) : std::nullopt;
    const cuda::Grid grid = grid_of(s, extra, lists ? &*lists : nullptr);
    dispatch_half(x.scalar_type(), "token_upsample", [&](auto tag) {
        using T_ = decltype(tag);
        auto go = [&](auto* kernel) {
            kernel<<<launch.blocks(kernel, rows, cuda::WARPS), cuda::THREADS, 0, launch.stream>>>(
                x.const_data_ptr<T_>(), skip.const_data_ptr<T_>(), grid, rows, C, out.mutable_data_ptr<T_>());
            Launch::succeed(cudaGetLastError());
        };
        if (C * sizeof(T_) % 16 == 0)
            go(&cuda::upsample_forward<T_, 16 / sizeof(T_)>);
        else
            go(&cuda::upsample_forward<T_, 1>);
    });
    return out;
}

Tensor token_upsample_backward_cuda(Tensor grad, Index extra, int64_t height, int64_t width, int64_t stride) {
    const Shape s = full_grid(grad, height, width, stride);
    if (extra) check_index(*extra, s.images);
    check_size(s, extra ? extra->size(1) : 0);
    const Launch launch(grad);
    grad = in_order(grad);
    if (extra) extra = torch::stable::contiguous(*extra);
    const int64_t C = s.channels, length = s.prefix + s.kept + (extra ? extra->size(1) : 0);
    const int64_t rows = s.images * length;
    Tensor grad_x = torch::stable::new_empty(grad, {s.images, length, C});
    const Index lists = extra ? Index(link_places(launch, *extra, 0, height * width)) : std::nullopt;
    const cuda::Grid grid = grid_of(s, extra, lists ? &*lists : nullptr);
    dispatch_half(grad.scalar_type(), "token_upsample_backward", [&](auto tag) {
        using T_ = decltype(tag);
        auto go = [&](auto* kernel) {
            kernel<<<launch.blocks(kernel, rows, cuda::WARPS), cuda::THREADS, 0, launch.stream>>>(
                grad.const_data_ptr<T_>(), extra ? extra->const_data_ptr<int64_t>() : nullptr, grid, rows, C,
                grad_x.mutable_data_ptr<T_>());
            Launch::succeed(cudaGetLastError());
        };
        if (C * sizeof(T_) % 16 == 0)
            go(&cuda::upsample_backward<T_, 16 / sizeof(T_)>);
        else
            go(&cuda::upsample_backward<T_, 1>);
    });
    return grad_x;
}

}  // namespace segvit
