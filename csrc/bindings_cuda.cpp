// Registers the CUDA kernels, and makes `import segvit._C_cuda` work: loading the library is all that import does.
#include "module.h"
#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(segvit, CUDA, m) {
    m.impl("token_downsample", TORCH_BOX(&segvit::token_downsample_cuda));
    m.impl("token_downsample_backward", TORCH_BOX(&segvit::token_downsample_backward_cuda));
    m.impl("token_upsample", TORCH_BOX(&segvit::token_upsample_cuda));
    m.impl("token_upsample_backward", TORCH_BOX(&segvit::token_upsample_backward_cuda));
}

SEGVIT_MODULE(_C_cuda)
