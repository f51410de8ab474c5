"""`sightline info`: what is installed, what this machine offers, and why each backend is or is not available."""

from __future__ import annotations

import json
import platform
from typing import Any

from sightline.cli.environment import instruction_sets, processor_name, versions


def collect() -> dict[str, Any]:
    """Versions, processor, instruction sets, threads and backends of this installation, ready for JSON."""
    import torch

    from sightline import ops

    return {
        "versions": versions(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "instruction_set": instruction_sets(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "backends": {
            name: {"available": available, "reason": reason}
            for name, (available, reason) in ops.backend_status().items()
        },
    }


def run(*, as_json: bool = False) -> int:
    """Print what `collect` found, as text or as JSON, and return the exit code."""
    found = collect()
    print(json.dumps(found, indent=1) if as_json else _text(found))
    return 0


def _text(found: dict[str, Any]) -> str:
    versions_found = found["versions"]
    isa = found["instruction_set"]
    lines = [f"sightline {versions_found['sightline']}"]
    lines += [
        f"  {name:<18}{number or 'not installed'}" for name, number in versions_found.items() if name != "sightline"
    ]
    lines += [
        "",
        f"  {'platform':<18}{found['platform']}",
        f"  {'processor':<18}{found['processor']}",
        f"  {'instruction set':<18}{isa['chosen'] or 'none'} (available: {', '.join(isa['available']) or 'none'})",
        f"  {'threads':<18}{found['threads']}",
        f"  {'GPUs':<18}{', '.join(found['gpus']) or 'none'}",
        "",
        "backends",
    ]
    lines += [
        f"  {name:<18}{'available' if backend['available'] else 'not available'}: {backend['reason']}"
        for name, backend in found["backends"].items()
    ]
    return "\n".join(lines)
