// Registers the CPU kernels, and makes `import segvit._C` work: loading the library is all that import does.
#include "module.h"
#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(segvit, CPU, m) {
    m.impl("token_downsample", TORCH_BOX(&segvit::token_downsample_cpu));
    m.impl("mask_decode_labels_native", TORCH_BOX(&segvit::mask_decode_labels_cpu));
    m.impl("mask_decode_scores_native", TORCH_BOX(&segvit::mask_decode_scores_cpu));
    m.impl("mask_loss_sums_native", TORCH_BOX(&segvit::mask_loss_sums_cpu));
    m.impl("mask_loss_gradient_native", TORCH_BOX(&segvit::mask_loss_gradient_cpu));
    m.impl("token_downsample_backward", TORCH_BOX(&segvit::token_downsample_backward_cpu));
    m.impl("token_upsample", TORCH_BOX(&segvit::token_upsample_cpu));
    m.impl("token_upsample_backward", TORCH_BOX(&segvit::token_upsample_backward_cpu));
}

SEGVIT_MODULE(_C)
