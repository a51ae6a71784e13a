"""Set before torch is imported: pytest runs two workers, so each one computes on one thread.

Notebook kernels are children of the workers and inherit it.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
