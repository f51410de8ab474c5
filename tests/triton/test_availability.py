"""Where the Triton backend is not available, a call says why."""

from __future__ import annotations

import pytest
import torch

import sightline as sl
from sightline import ops
from sightline.ops import backends

pytestmark = pytest.mark.skipif(backends.INTERPRETS_TRITON, reason="the interpreter takes CPU tensors")


def call(backend: str) -> torch.Tensor:
    tensor = torch.randn(1, 1, 3, 8)
    return sl.attention(tensor, tensor, tensor, backend=backend)


def test_a_cpu_tensor_is_refused_with_the_way_out() -> None:
    if backends._WHY_NO_TRITON is None:
        with pytest.raises(NotImplementedError, match=r"device 'cpu'.*TRITON_INTERPRET=1"):
            call("triton")


@pytest.mark.parametrize(
    ("version", "reason"),
    [("3.3.1", r"Triton 3\.3\.1 is too old \(at least 3\.4"), ("3.10.0", None), ("4.0+git", None)],
)
def test_versions_are_compared_as_numbers(version: str, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_triton_version", lambda: version)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    why = backends._why_no_triton()
    if reason is None:
        assert why is None or "Triton" not in why
        return
    monkeypatch.setattr(backends, "_WHY_NO_TRITON", why)
    with pytest.raises(NotImplementedError, match=reason):
        call("triton")
    assert ops.backend_status()["triton"] == (False, why)


def test_a_missing_triton_leaves_the_other_backends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backends, "_WHY_NO_TRITON", backends._why_no_triton())
    with pytest.raises(NotImplementedError, match="Triton is not installed"):
        call("triton")
    assert call("auto").shape == (1, 1, 3, 8)
