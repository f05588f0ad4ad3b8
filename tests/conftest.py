"""Before any test imports PyTorch or Triton."""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side, see pytest.ini

# A shell without job control starts what runs in the background with Ctrl-C ignored, and programs
# that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # without a GPU, kernels run in Triton's interpreter
