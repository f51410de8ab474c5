"""The child process that looks at a machine: prints one JSON object, its device or why there is none.

A process of its own, because a driver in a bad state can hang whoever asks it first.
"""

from __future__ import annotations

import importlib.util
import json
import os
from typing import Any


def absence() -> str | None:
    """Why nothing can be measured here; None where there is a GPU, which torch calls "cuda" with ROCm too."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was built without CUDA or ROCm"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} finds no GPU"


def describe_libraries() -> dict[str, dict[str, Any]]:
    """Whether the native library and that of the CUDA kernels load here, and why not."""
    from sightline.ops.library import cuda_library, native_library

    libraries = {"native": native_library(), "cuda": cuda_library()}
    return {name: {"loaded": library.loaded, "reason": library.reason} for name, library in libraries.items()}


def describe() -> dict[str, Any]:
    """Device, versions, processors, pytest and its plugins, and what sightline says of its libraries."""
    import torch

    from sightline import ops
    from sightline.cli import environment

    installed = ("pytest", "xdist", "pytest_timeout", "hypothesis")
    return {
        "device": environment.describe_device(torch.device("cuda")),
        "versions": environment.versions() | {"cuda": torch.version.cuda, "rocm": torch.version.hip},
        "processors": len(os.sched_getaffinity(0)),
        "installed": [name for name in installed if importlib.util.find_spec(name) is not None],
        "libraries": describe_libraries(),
        "backends": {name: list(status) for name, status in ops.backend_status().items()},
    }


def main() -> None:
    """Print what was found."""
    why = absence()
    print(json.dumps({"absent": why} if why is not None else describe()))


if __name__ == "__main__":
    main()
