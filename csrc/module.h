// An empty Python module of this library's name: importing it loads the library, whose operators register themselves.
#pragma once

#include <Python.h>
#include <torch/csrc/stable/library.h>

#define SEGVIT_MODULE(NAME)                                                                          \
    extern "C" __attribute__((visibility("default"))) PyObject* PyInit_##NAME() {                    \
        static PyModuleDef module = {                                                                \
            PyModuleDef_HEAD_INIT, #NAME, nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr}; \
        return PyModule_Create(&module);                                                             \
    }
