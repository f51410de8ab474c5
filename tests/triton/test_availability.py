"""Where the Triton backend is not available, a call says why."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

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
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: SimpleNamespace(origin="somewhere"))
    why = backends._why_no_triton()
    if reason is None:
        assert why is None or "Triton" not in why
        return
    monkeypatch.setattr(backends, "_WHY_NO_TRITON", why)
    with pytest.raises(NotImplementedError, match=reason):
        call("triton")
    assert ops.backend_status()["triton"] == (False, why)


def test_a_folder_of_that_name_on_the_path_is_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tests/triton is, with tests on the path."""
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=None))
    assert "Triton is not installed" in backends._why_no_triton()


class CudaQuery:
    """What the choice of a backend looks at."""

    device, dtype, shape = torch.device("cuda:1"), torch.float16, (1, 1, 3, 8)

    def __getitem__(self, place: Any) -> CudaQuery:
        return self


@pytest.mark.parametrize("choose", [backends.choose_backend, backends.choose_recurrence_backend])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), None])
def test_gpus_before_ampere_are_refused_by_name(
    capability: tuple[int, int] | None, choose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_WHY_NO_TRITON", None)
    monkeypatch.setattr(backends, "_capabilities", {})
    monkeypatch.setattr(backends, "_warned_devices", set())
    monkeypatch.setattr(backends, "_capability", lambda device: capability)
    if capability != (7, 5):
        assert choose(CudaQuery(), "triton") == choose(CudaQuery(), "auto") == "triton"
        return
    reason = r"need compute capability 8\.0 or newer, and cuda:1 has 7\.5"
    with pytest.raises(NotImplementedError, match=reason):
        choose(CudaQuery(), "triton")
    with pytest.warns(UserWarning, match=reason):
        assert choose(CudaQuery(), "auto") == "reference"


@pytest.mark.parametrize("widths", [(300, 8), (8, 300)])
def test_a_width_without_kernels_falls_back_by_name_or_is_refused(
    widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_WHY_NO_TRITON", None)
    monkeypatch.setattr(backends, "_capabilities", {CudaQuery.device: (9, 0)})
    monkeypatch.setattr(backends, "_warned_devices", set())
    query = CudaQuery()
    query.shape = (1, 1, 3, widths[0])
    reason = rf"head widths up to 256, got {widths[0]} \(query\) and {widths[1]} \(value\)"
    with pytest.raises(NotImplementedError, match=reason):
        backends.choose_backend(query, "triton", widths[1])
    with pytest.warns(UserWarning, match=reason):
        assert backends.choose_backend(query, "auto", widths[1]) == "reference"


def test_a_missing_triton_leaves_the_other_backends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backends, "_WHY_NO_TRITON", backends._why_no_triton())
    with pytest.raises(NotImplementedError, match="Triton is not installed"):
        call("triton")
    assert call("auto").shape == (1, 1, 3, 8)
