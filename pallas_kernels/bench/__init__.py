"""Measures of kernels: `python -m pallas_kernels.bench --help`."""
