"""Let each of the two workers compute on one thread; set before torch is imported.

Notebook kernels are children of the workers and inherit it.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
