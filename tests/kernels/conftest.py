import triton_device  # noqa: F401  (before any test module imports the kernels)
