"""Lets the suites import attention_peers, which the scripts beside them find by themselves."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
