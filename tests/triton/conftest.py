"""Where the tests of the Triton kernels run.

Triton decides between its compiler and its interpreter once per process. So tests/triton/kernels is collected where the
kernels can run: on a CUDA device, or in a process that the interpreter was chosen for. Elsewhere test_interpreter.py
starts such processes.
"""

from __future__ import annotations

import torch

from sightline.ops.backends import INTERPRETS_TRITON

if not INTERPRETS_TRITON and not torch.cuda.is_available():
    collect_ignore = ["kernels"]
