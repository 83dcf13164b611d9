"""`python -m pallas_kernels.bench`: numbers first, then times."""

import os
import sys

# Before jax looks for a GPU: memory is taken as it is needed, and most of it may be. torch, where
# there is one to compare with, reads the same arrays.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")

from pallas_kernels.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
