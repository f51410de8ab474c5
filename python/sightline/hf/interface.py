"""Which modules of a model go through transformers' AttentionInterface, found in their code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import CodeType, FunctionType

from torch import nn
from transformers import PreTrainedModel

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_ATTENTION_NAME = re.compile(r"Attention|Attn")
# Linear attention has no weights that could be exchanged, and a layer computes attention in a module of its own.
_NO_ATTENTION_NAME = re.compile(r"Linear|Lightning|Layer$")
_IMPLEMENTATIONS = frozenset({"eager", "sdpa", "flash_attention_2", "flex_attention"})


def _names(code: CodeType) -> Iterator[str]:
    """The names that the code looks up, nested functions included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _constants(value: object) -> Iterator[object]:
    """The constants of some code, those in tuples, sets and nested functions included."""
    if isinstance(value, CodeType):
        value = value.co_consts
    if isinstance(value, (tuple, frozenset)):
        for constant in value:
            yield from _constants(constant)
    else:
        yield value


_parameters: dict[type[nn.Module], frozenset[str] | None] = {}
_naming: dict[type[nn.Module], bool] = {}


def _interface_functions(module_type: type[nn.Module]) -> tuple[FunctionType, ...]:
    """The methods of this class that look an attention function up in the interface."""
    found: list[FunctionType] = []
    seen: set[str] = set()
    for owner in module_type.__mro__:
        # The class that lets an implementation be chosen names the interface too.
        if owner in (nn.Module, PreTrainedModel):
            continue
        for name, attribute in vars(owner).items():
            function = inspect.unwrap(attribute) if callable(attribute) else None
            if name in seen or not isinstance(function, FunctionType):
                continue
            seen.add(name)
            if _INTERFACE in _names(function.__code__):
                found.append(function)
    return tuple(found)


def uses_interface(module: nn.Module) -> bool:
    """Whether this module computes attention through the interface."""
    return bool(_interface_functions(type(module)))


def eager_parameters(module_type: type[nn.Module]) -> frozenset[str] | None:
    """What the eager attention function of this class takes by name, None where there is no such function.

    It is what defines the model: an argument that it does not take by name does not change the model's attention.
    """
    if module_type in _parameters:
        return _parameters[module_type]
    parameters: set[str] = set()
    found = False
    for function in _interface_functions(module_type):
        for name in _names(function.__code__):
            eager = function.__globals__.get(name)
            if "eager" in name and callable(eager):
                found = True
                parameters.update(inspect.signature(eager).parameters)
    _parameters[module_type] = frozenset(parameters) if found else None
    return _parameters[module_type]


def names_implementations(module_type: type[nn.Module]) -> bool:
    """Whether the methods that go through the interface do one thing for some implementations, another for others."""
    if module_type not in _naming:
        _naming[module_type] = any(
            isinstance(constant, str) and constant in _IMPLEMENTATIONS
            for function in _interface_functions(module_type)
            for constant in _constants(function.__code__)
        )
    return _naming[module_type]


def attention_modules(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The attention modules of a model that go through the interface, and those that do not, by their names.

    A module is taken for attention by its class's name. One that contains an interface module, or lies in one, is a
    part of it; one without a parameter computes no attention of its own.
    """
    modules = dict(model.named_modules())
    through = {name: module for name, module in modules.items() if uses_interface(module)}
    aside = {}
    for name, module in modules.items():
        type_name = type(module).__name__
        if name in through or _ATTENTION_NAME.search(type_name) is None or _NO_ATTENTION_NAME.search(type_name):
            continue
        related = any(f"{other}.".startswith(f"{name}.") or f"{name}.".startswith(f"{other}.") for other in through)
        if name and not related and any(True for _ in module.parameters()):
            aside[name] = module
    return through, aside
