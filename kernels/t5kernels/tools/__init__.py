"""Commands that measure and tune the kernels, and the recorder of CUDA graphs that every benchmark shares."""
