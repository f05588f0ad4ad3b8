"""Before any test imports PyTorch: one thread each, for the tests run side by side (pytest.ini)."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
