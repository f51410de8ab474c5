"""Where the tests of the Triton kernels run.

Triton decides between its compiler and its interpreter once per process. So tests/triton/kernels is collected where the
kernels can run: on a CUDA device, or in a process that the interpreter was chosen for. Elsewhere test_interpreter.py
starts such processes.
"""

from __future__ import annotations

import importlib.util
import sys

import torch

from sightline.ops.backends import INTERPRETS_TRITON

_found = importlib.util.find_spec("triton")
_is_missing = _found is None or _found.origin is None
if _is_missing:
    # Without Triton this folder would be imported by its name, for tests is on the path: now importorskip sees that.
    sys.modules["triton"] = None
if _is_missing or (not INTERPRETS_TRITON and not torch.cuda.is_available()):
    collect_ignore = ["kernels"]
