"""Other weights for the model that is running: read and checked beside it, and put in place between two of its steps.

They are read as they are when a worker starts, by transformers itself, into a model of the same class: what the files call a
weight, which of them are one, and how several become one are its business. What comes out has to fit the running model weight
by weight, or nothing is changed. Default types of tensors are of the whole process in torch, so that model is made in float32, as
all that runs meanwhile expects it, and brought into the running model's types afterwards.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as bars

from zfabric.backends.front.weight_files import WeightFiles
from zfabric.backends.hf_transformers.parameters import packing
from zfabric.backends.hf_transformers.parameters.merged_linear import merged_names
from zfabric.errors import RequestError, UnsupportedOperationError

#: Types that are brought into the model's own, as when it is loaded.
_FLOATS: Final = ("F64", "F32", "F16", "BF16")
_OTHERS: Final = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
#: What safetensors allows for the list of its tensors, and the widest type in which weights usually come.
_HEADER_BYTES_MAX: Final = 100_000_000
_FLOAT_BYTES: Final = 4
#: Settings of a model that say nothing of what its weights mean.
_NO_MATTER: Final = frozenset(
    {
        "_name_or_path", "name_or_path", "architectures", "attn_implementation", "dtype", "torch_dtype", "id2label", "label2id",
        "problem_type", "transformers_version", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
        "decoder_start_token_id", "output_attentions", "output_hidden_states", "return_dict", "initializer_range",
    }
)  # fmt: skip
#: Names that a message has at most of each kind.
_NAMES_TOLD: Final = 5


class NewWeights:
    """Weights that fit the running model, ready to take the place of its own.

    Args:
        pairs: Of the running model and of these, tensor by tensor.
        merged: How many more they are than pairs, since the running model has some merged.
    """

    def __init__(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], merged: int = 0) -> None:
        self._pairs = pairs
        self._count = len(pairs) + merged

    def __len__(self) -> int:
        return self._count

    @torch.no_grad()
    def exchange(self) -> None:
        """Put them in place, on the thread that runs the model, and hold the former ones. If it raises, those are back."""
        done: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            for pair in self._pairs:
                _exchange(*pair)
                done.append(pair)
            if any(live.device.type == "cuda" for live, _ in self._pairs):
                # What a device could not do is known here, and not in the step after.
                torch.cuda.synchronize()
        except BaseException:
            for pair in reversed(done):
                _exchange(*pair)
            raise


class Weights:
    """Reads weights for a model.

    Args:
        model: Of transformers, as it runs.
        outside: Whether what it serves takes more than its own weights, such as layers after it or a copy of its head.
    """

    def __init__(self, model: Any, *, outside: bool = False) -> None:
        self._model = model
        self._outside = outside

    @property
    def file_bytes_max(self) -> int:
        """What a file of its weights has at most."""
        # Not from `state_dict`: bitsandbytes' layers pack their weights anew for that, and answer otherwise afterwards.
        tensors = (
            *self._model.named_parameters(remove_duplicate=False),
            *self._model.named_buffers(remove_duplicate=False),
        )
        return _HEADER_BYTES_MAX + _FLOAT_BYTES * sum(int(one.numel()) for _, one in tensors)

    def check(self) -> None:
        """Raises: UnsupportedOperationError: Weights of this model cannot be replaced."""
        because = None
        if getattr(self._model.config, "quantization_config", None) is not None:
            because = "they are quantized"
        elif any(one.is_meta for one in _tensors(self._model).values()):
            because = "some of them are kept off the device"
        elif self._outside:
            because = "its vectors or verdicts are computed by layers outside of it as well"
        if because is not None:
            raise UnsupportedOperationError(
                f"the weights of this model cannot be replaced while it runs: {because}", operation="operate"
            )

    def read(self, files: WeightFiles) -> NewWeights:
        """Read weights and check them. On any thread, one at a time; it takes as long as loading a model.

        Raises:
            UnsupportedOperationError: See `check`.
            RequestError: They are not those of this model; the message says which differ in what.
        """
        self.check()
        if files.config is not None:
            self._check_config(files.config)
        live = _tensors(self._model)
        try:
            wrong_types = list(_wrong_types(files.tensor_files, live))
            with files.as_directory() as directory, _without_bars():
                made, told = self._made(directory)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise RequestError(f"the weights cannot be read: {error}") from error
        fresh = _tensors(made)
        differences = {
            "missing": sorted(told["missing_keys"]),
            "unexpected": sorted(told["unexpected_keys"]),
            "other shapes": sorted(
                f"{name} {tuple(theirs)} for {tuple(ours)}" for name, theirs, ours in told["mismatched_keys"]
            ),
            "other types": sorted(wrong_types),
            "no longer one": list(_torn(live, fresh)),
            "not understood": [str(one) for one in told["error_msgs"]],
        }
        _refuse(differences, "the weights are not those of this model")
        merged = dict(merged_names(self._model))
        return NewWeights(list(_pairs(live, fresh, merged)), sum(len(names) - 1 for names in merged.values()))

    def _made(self, directory: Path) -> tuple[Any, dict[str, Any]]:
        """A model of these weights, on the CPU, and what was found of them."""
        made, told = type(self._model).from_pretrained(
            str(directory), config=copy.deepcopy(self._model.config), dtype=torch.float32, use_safetensors=True,
            local_files_only=True, ignore_mismatched_sizes=True, output_loading_info=True,
            # Not that it mattered, but it would be looked for among the files.
            generation_config=copy.deepcopy(getattr(self._model, "generation_config", None)),
        )  # fmt: skip
        return made, told

    def _check_config(self, path: Path) -> None:
        """Raises: RequestError: The weights were saved by a model with other settings."""
        config = self._model.config
        try:
            saved = type(config).from_dict(json.loads(path.read_text(encoding="utf-8")))
        except Exception as error:
            # Each class checks its settings in its own way.
            raise RequestError(f"the config.json beside the weights cannot be read: {error}") from error
        ours, theirs = _settings(config), _settings(saved)
        changed = [
            f"{name} {theirs.get(name)!r} for {ours.get(name)!r}"
            for name in sorted({*ours, *theirs})
            if not _same(ours.get(name), theirs.get(name))
        ]
        _refuse({"other settings": changed}, "the weights were saved by another model")


@contextmanager
def _without_bars() -> Iterator[None]:
    """A trainer sends weights again and again; bars are for whoever looks on."""
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    """Its weights, and the buffers that are saved with them; what is one has several names."""
    return dict(model.state_dict(keep_vars=True))


def _wrong_types(files: list[Path], live: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Tensors that could only become the model's by being taken for something else."""
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 — it is no mapping
                kind = tensors.get_slice(name).get_dtype()
                ours = live.get(name)
                if kind in _FLOATS:
                    if ours is not None and not ours.is_floating_point():
                        yield f"{name} {kind} for {ours.dtype}"
                elif ours is not None:
                    if ours.dtype != _OTHERS.get(kind):
                        yield f"{name} {kind} for {ours.dtype}"
                elif name.endswith(".weight"):
                    # Of a part of a weight, such as an expert's. What else is unknown is unexpected, or a table nobody reads.
                    yield f"{name} {kind}"


def _torn(live: Mapping[str, torch.Tensor], fresh: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Weights that are one in the running model and differ among these."""
    first: dict[int, str] = {}
    for name, tensor in live.items():
        other = first.setdefault(id(tensor), name)
        if other == name or name not in fresh or fresh[other] is fresh[name]:
            continue
        if fresh[other].shape != fresh[name].shape or not torch.equal(fresh[other], fresh[name]):
            yield f"{other} and {name}"


def _pairs(
    live: Mapping[str, torch.Tensor], fresh: Mapping[str, torch.Tensor], merged: Mapping[str, list[str]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each tensor of the running model once, and what takes its place, in memory of its own: files may change.

    Args:
        merged: Names of those that are several.
    """
    seen: set[int] = set()
    for name, ours in live.items():
        if id(ours) in seen:
            continue
        seen.add(id(ours))
        parts = [fresh[one].detach().to("cpu", ours.dtype) for one in merged.get(name, [name])]
        theirs = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
        yield ours, packing.packed(theirs) if ours.is_mkldnn else theirs


def _exchange(live: torch.Tensor, other: torch.Tensor) -> None:
    """What is in the one is in the other afterwards. Applied twice it changes nothing."""
    if live.device == other.device:
        live.data, other.data = other.data, live.data
        return
    sent, held = other.to(live.device), live.to(other.device)
    live.copy_(sent)
    other.copy_(held)


def _settings(config: Any) -> dict[str, Any]:
    """What of a configuration says what weights mean, by paths."""
    found: dict[str, Any] = {}

    def add(settings: Mapping[str, Any], before: str) -> None:
        for name, value in settings.items():
            if name in _NO_MATTER or name.startswith("_"):
                continue
            if isinstance(value, Mapping):
                add(value, f"{before}{name}.")
            else:
                found[before + name] = list(value) if isinstance(value, tuple) else value

    add(config.to_dict(), "")
    return found


def _same(one: Any, other: Any) -> bool:
    """Whether two settings are; other formats hold numbers in 32 bits."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def _refuse(differences: Mapping[str, list[str]], what: str) -> None:
    """Raises: RequestError if there are any."""
    told = []
    for kind, names in differences.items():
        if names:
            more = f" and {len(names) - _NAMES_TOLD} more" if len(names) > _NAMES_TOLD else ""
            told.append(f"{kind}: {', '.join(names[:_NAMES_TOLD])}{more}")
    if told:
        counts = {kind.replace(" ", "_"): len(names) for kind, names in differences.items() if names}
        raise RequestError(f"{what}; {'; '.join(told)}", **counts)
