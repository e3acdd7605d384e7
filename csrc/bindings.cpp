// Registers the CPU kernels, and makes `import segvit._C` work: loading the library is all that import does.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(segvit, CPU, m) {
    m.impl("token_downsample", TORCH_BOX(&segvit::token_downsample_cpu));
    m.impl("mask_decode_labels_native", TORCH_BOX(&segvit::mask_decode_labels_cpu));
    m.impl("mask_decode_scores_native", TORCH_BOX(&segvit::mask_decode_scores_cpu));
    m.impl("mask_loss_sums_native", TORCH_BOX(&segvit::mask_loss_sums_cpu));
    m.impl("mask_loss_gradient_native", TORCH_BOX(&segvit::mask_loss_gradient_cpu));
    m.impl("token_downsample_backward", TORCH_BOX(&segvit::token_downsample_backward_cpu));
}

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
