"""What tests of the recurrence as a citizen of PyTorch put around it, whichever backend computes."""

from __future__ import annotations

import io
from typing import Any

import torch

import sightline as sl


def make_inputs(*, batch=2, heads=4, key_heads=2, length=9, width=8, value_width=6, grad=False, dtype=torch.float32):
    shapes = [
        (batch, heads, length, width),
        (batch, key_heads, length, width),
        (batch, key_heads, length, value_width),
    ]
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes)


def make_state(sequences=2, grad=False):
    return sl.RecurrenceState(
        torch.randn(sequences, 2, 8, requires_grad=grad), torch.randn(sequences, 2, 8, 6, requires_grad=grad)
    )


class Layer(torch.nn.Module):
    """A projection to queries, keys and values of four heads, and the recurrence."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.projection = torch.nn.Linear(32, 96)
        self.backend = backend

    def forward(self, hidden, cuts=None):
        query, key, value = self.projection(hidden).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        output = sl.additive_recurrence(query, key, value, cu_seqlens=cuts, backend=self.backend)
        return output.transpose(1, 2).flatten(2)


def reloaded(program: torch.export.ExportedProgram, operator: Any) -> torch.nn.Module:
    """The module after a way through a file; it calls the operator."""
    assert any(node.target is operator for node in program.graph.nodes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


def assert_export_keeps_the_numbers(backend: str, operator: Any) -> None:
    layer, length = Layer(backend), torch.export.Dim("length", min=2, max=512)
    program = torch.export.export(layer, (torch.randn(2, 10, 32),), dynamic_shapes=({1: length},))
    module = reloaded(program, operator)
    for positions in (10, 33):
        hidden = torch.randn(2, positions, 32)
        torch.testing.assert_close(module(hidden), layer(hidden))


def assert_export_with_documents_keeps_the_numbers(backend: str, operator: Any) -> None:
    layer, length, documents = Layer(backend), torch.export.Dim("length", min=2), torch.export.Dim("documents", min=2)
    example = (torch.randn(1, 10, 32), torch.tensor([0, 3, 10], dtype=torch.int32))
    module = reloaded(torch.export.export(layer, example, dynamic_shapes=({1: length}, {0: documents})), operator)
    for positions, offsets in ((10, [0, 3, 10]), (33, [2, 2, 9, 30])):
        given = (torch.randn(1, positions, 32), torch.tensor(offsets, dtype=torch.int32))
        torch.testing.assert_close(module(*given), layer(*given))
