"""What compilers make of kernels, without an accelerator: lowering, and compiling ahead of time."""
