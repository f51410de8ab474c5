"""What the tests of the transformers integration share."""

from __future__ import annotations

import pytest
import transformers


@pytest.fixture(autouse=True)
def quiet_transformers():
    """transformers' own warnings are about tokenizers and generation settings that tiny models do not have."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)
