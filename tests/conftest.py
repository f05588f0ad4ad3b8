"""Before any test imports PyTorch or Triton."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side, see pytest.ini

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # without a GPU, kernels run in Triton's interpreter
