"""Why targets are not met, in words: by the instruction set that was measured, and by the target's text.

What stands here was found with the parts of attention timed apart, or with a profile, and holds whatever the next run
measures; limits that follow from the results themselves are computed with the targets. A reason is shown only where its
target is not met.
"""

from __future__ import annotations

REASONS: dict[str, dict[str, str]] = {}
