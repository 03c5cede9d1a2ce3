"""Layers of one input are one product: each has its part, and whatever else reads or watches them goes on."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from zfabric.backends.hf_transformers.parameters import packing
from zfabric.backends.hf_transformers.parameters.merged_linear import LinearPart, MergedLinear, merge, merged_names
from zfabric.backends.hf_transformers.parameters.packing import pack

NAMES = ("first", "second", "third")
SIZES = (48, 16, 16)


def made(*, bias: bool = False, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    parent = torch.nn.Module()
    for name, size in zip(NAMES, SIZES, strict=True):
        parent.add_module(name, torch.nn.Linear(32, size, bias=bias, dtype=dtype))
    return parent


def called(parent: torch.nn.Module, given: torch.Tensor) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [getattr(parent, name)(given) for name in NAMES]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_layer_has_its_part(monkeypatch: pytest.MonkeyPatch, packed: bool, bias: bool, dtype: torch.dtype) -> None:
    monkeypatch.setattr(packing, "_WEIGHTS_MIN", 1)
    parent = made(bias=bias, dtype=dtype)
    weights = [getattr(parent, name).weight.detach().clone() for name in NAMES]
    biases = [getattr(parent, name).bias for name in NAMES]
    if packed and dtype not in packing._dtypes():
        pytest.skip(f"this processor has no kernels for packed weights in {dtype}")
    assert not packed or pack(parent) == len(NAMES)
    given = torch.randn(1, 5, 32, dtype=dtype)
    expected = called(parent, given)
    merged = merge(parent, NAMES)
    assert merged is not None
    assert merged.weight.is_mkldnn == packed
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    for one, other in zip(called(parent, given), expected, strict=True):
        torch.testing.assert_close(one, other, **close)
    for index, name in enumerate(NAMES):
        part = getattr(parent, name)
        assert isinstance(part, LinearPart)
        assert (part.in_features, part.out_features) == (32, SIZES[index])
        assert torch.equal(part.weight, weights[index])
        assert part.bias is None if biases[index] is None else torch.equal(part.bias, biases[index])


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_an_input_is_multiplied_once_whoever_comes_first(
    monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]
) -> None:
    parent = made()
    merged = merge(parent, NAMES)
    assert merged is not None
    inputs: list[torch.Tensor] = []

    def counted(given: torch.Tensor) -> torch.Tensor:
        inputs.append(given)
        return MergedLinear.forward(merged, given)

    monkeypatch.setattr(merged, "forward", counted)
    one, other = torch.randn(2, 32), torch.randn(2, 32)
    for given in (one, other, one):
        for index in order:
            expected = given @ getattr(parent, NAMES[index]).weight.T
            torch.testing.assert_close(getattr(parent, NAMES[index])(given), expected)
    assert len(inputs) == 3
    # Who is called twice, and who is called alone, has the right values as well.
    for given in (one, one, other):
        torch.testing.assert_close(parent.second(given), given @ parent.second.weight.T)


def test_what_is_hooked_to_a_layer_sees_its_part() -> None:
    parent = made()
    given = torch.randn(2, 32)
    expected = called(parent, given)
    merge(parent, NAMES)
    parent.second.register_forward_hook(lambda _, __, output: output * 2)
    first, second, third = called(parent, given)
    torch.testing.assert_close(first, expected[0])
    torch.testing.assert_close(second, expected[1] * 2)
    torch.testing.assert_close(third, expected[2])


def other_type(parent: Any) -> None:
    parent.third = torch.nn.Linear(32, 16, bias=False, dtype=torch.bfloat16)


def other_input(parent: Any) -> None:
    parent.third = torch.nn.Linear(24, 16, bias=False)


def one_bias(parent: Any) -> None:
    parent.third = torch.nn.Linear(32, 16)


def watched(parent: Any) -> None:
    parent.third.register_forward_hook(lambda *_: None)


def replaced(parent: Any) -> None:
    parent.third.forward = lambda given: given


def other_kind(parent: Any) -> None:
    parent.third = torch.nn.Identity()


def missing(parent: Any) -> None:
    del parent.third


@pytest.mark.parametrize("change", [other_type, other_input, one_bias, watched, replaced, other_kind, missing])
def test_layers_that_are_not_alike_stay(change: Any) -> None:
    parent = made()
    change(parent)
    before = dict(parent.named_modules())
    assert merge(parent, NAMES) is None
    assert dict(parent.named_modules()) == before


def test_its_tensors_are_known_by_their_former_names() -> None:
    model = torch.nn.ModuleDict({"a": made(bias=True), "b": made()})
    names = set(model.state_dict())
    for parent in model.values():
        assert merge(parent, NAMES) is not None
    merged = dict(merged_names(model))
    assert set(merged) == set(model.state_dict()) == {"a.merged.weight", "a.merged.bias", "b.merged.weight"}
    assert merged["b.merged.weight"] == ["b.first.weight", "b.second.weight", "b.third.weight"]
    assert {name for parts in merged.values() for name in parts} == names
