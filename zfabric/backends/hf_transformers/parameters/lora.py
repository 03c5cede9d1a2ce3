"""LoRA: many adapters on one model, a different one for each row of a batch, never switched for anybody else.

The layers that adapters change get a hook that adds, to the rows that want it, what their adapter says. The model's own
weights stay as they are, so rows without an adapter, and quantized weights, are served by the same pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

from zfabric.backends.hf_transformers.parameters.merged_linear import LinearPart
from zfabric.backends.hf_transformers.parameters.packing import dense
from zfabric.errors import BackendError, ConfigurationError

#: How PEFT's files name what belongs to a layer.
_PREFIX: Final = "base_model.model."
_DOWN: Final = ".lora_A.weight"
_UP: Final = ".lora_B.weight"
#: A copy of the model's own weights, which PEFT saves along for the first and the last layer.
_BASE: Final = ".base_layer.weight"
#: Settings of PEFT that change what an adapter means, and the only values that are understood.
_UNDERSTOOD: Final[dict[str, tuple[Any, ...]]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None, []),
}


@dataclass(frozen=True, slots=True)
class Adapter:
    """What is added to layers of the model: `(x @ down) @ up` to what a layer makes of x.

    Attributes:
        name: The model's name for clients.
        path: Where it was read from.
        layers: By the layer's name: down (inputs, rank), and up (rank, outputs), which holds the scale.
        pinned: What an operator asked for; none is ever dropped here while it is loaded.
        number: Another for each that was ever read: what was computed with one is not another's of the same name.
    """

    name: str
    path: str
    layers: dict[str, tuple[torch.Tensor, torch.Tensor]]
    pinned: bool = False
    number: int = field(default_factory=count(1).__next__)

    @property
    def rank(self) -> int:
        """The greatest of its layers."""
        return max(down.shape[1] for down, _ in self.layers.values())


class Lora:
    """Adapters of one model. `install` and `rows` belong to the thread that runs the model.

    Args:
        model: Of transformers.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._hooked: set[str] = set()
        #: Layers that the model does not call, though it runs what they belong to: it reads their weights past them, or not at
        #: all, and nothing can be added to what they make.
        self._passed_over: frozenset[str] = frozenset()
        #: Of the pass under way: adapters, and the rows that want each; None for all rows.
        self._active: list[tuple[Adapter, torch.Tensor | None]] = []
        self._rows = 0

    @contextmanager
    def observed(self) -> Iterator[None]:
        """During a pass of the whole model, which shows what layers it calls."""
        called: set[str] = set()
        modules = dict(self._model.named_modules())
        hooks = [module.register_forward_hook(partial(_note, called, name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        # Experts that no token was sent to are not called either, nor is what they belong to.
        self._passed_over = frozenset(
            name for name in modules if name not in called and name.rpartition(".")[0] in called
        )

    def read(self, name: str, directory: Path, *, pinned: bool = False) -> Adapter:
        """Read an adapter that PEFT saved. On any thread.

        Raises:
            ConfigurationError: It is not there, is of a kind that is not understood, or does not fit the model.
        """
        settings = _settings(directory)
        for key, values in _UNDERSTOOD.items():
            if settings.get(key) not in values:
                raise ConfigurationError(f"adapter {directory} has {key}={settings[key]!r}, which is not supported")
        try:
            tensors = load_file(directory / "adapter_model.safetensors")
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"adapter {directory} cannot be read: {error}") from error
        known = dict(self._model.named_modules())
        layers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for key in tensors:
            if key.endswith(_BASE) and _equal(known.get(key.removeprefix(_PREFIX).removesuffix(_BASE)), tensors[key]):
                continue
            if not key.endswith((_DOWN, _UP)):
                raise ConfigurationError(f"adapter {directory} holds {key}, which is not supported")
            if key.endswith(_DOWN):
                layer = key.removeprefix(_PREFIX).removesuffix(_DOWN)
                up = tensors.get(key.removesuffix(_DOWN) + _UP)
                matrices = self._fitted(directory, layer, known.get(layer), tensors[key], up, settings)
                if layer not in self._passed_over:
                    layers[layer] = matrices
                elif matrices[1].any():
                    raise ConfigurationError(
                        f"adapter {directory} changes {layer!r}, which the model never calls, so that it would change nothing"
                    )
        if not layers:
            raise ConfigurationError(f"adapter {directory} changes no layer")
        return Adapter(name, str(directory), layers, pinned)

    def _fitted(
        self, directory: Path, layer: str, module: Any, down: torch.Tensor, up: torch.Tensor | None, settings: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both matrices as they are multiplied, on the layer's device and in the model's type."""
        device = _device(module)
        if up is None or device is None:
            raise ConfigurationError(f"adapter {directory} changes {layer!r}, which is no linear layer of the model")
        inputs, outputs = _size(module)
        if (down.shape[1], up.shape[0]) != (inputs, outputs) or down.shape[0] != up.shape[1]:
            raise ConfigurationError(
                f"adapter {directory} has {tuple(down.shape)} and {tuple(up.shape)} for {layer!r}, "
                f"which takes {inputs} values and gives {outputs}"
            )
        rank = down.shape[0]
        alpha = _pattern(settings.get("alpha_pattern"), layer, float(settings.get("lora_alpha", 8)))
        scale = alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank
        to = {"device": device, "dtype": self._model.dtype}
        return down.T.contiguous().to(**to), (up.float().T * scale).contiguous().to(**to)

    def install(self, adapter: Adapter) -> None:
        """Have its layers ask for what is to be added. Between two passes."""
        for layer in adapter.layers.keys() - self._hooked:
            self._model.get_submodule(layer).register_forward_hook(self._hook(layer))
            self._hooked.add(layer)

    @contextmanager
    def rows(self, adapters: Sequence[Adapter | None]) -> Iterator[None]:
        """For one pass, add to each row what its adapter says.

        Args:
            adapters: Of each row; empty for none at all.
        """
        places: dict[int, list[int]] = {}
        for row, adapter in enumerate(adapters):
            if adapter is not None:
                places.setdefault(id(adapter), []).append(row)
        self._rows = len(adapters)
        for rows in places.values():
            adapter = adapters[rows[0]]
            assert adapter is not None
            index = None if len(rows) == len(adapters) else torch.tensor(rows, device=self._model.device)
            self._active.append((adapter, index))
        try:
            yield
        finally:
            self._active = []

    def _hook(self, layer: str) -> Callable[[Any, Any, torch.Tensor], torch.Tensor | None]:
        def add(_: Any, given: Any, output: torch.Tensor) -> torch.Tensor | None:
            if not self._active:
                return None
            for adapter, index in self._active:
                matrices = adapter.layers.get(layer)
                if matrices is not None:
                    output = self._added(output, given[0], index, *matrices)
            return output

        return add

    def _added(
        self, output: torch.Tensor, x: torch.Tensor, index: torch.Tensor | None, down: torch.Tensor, up: torch.Tensor
    ) -> torch.Tensor:
        if index is None:
            return output + (x.to(down.dtype) @ down @ up).to(output.dtype)
        if x.shape[0] != self._rows and x.dim() == 2 and x.shape[0] % self._rows == 0:
            # Some layers see all columns of all rows in a line.
            columns = torch.arange(x.shape[0] // self._rows, device=x.device)
            index = (index.unsqueeze(1) * columns.shape[0] + columns).flatten()
        elif x.shape[:2] == (1, self._rows):
            # The tokens of all rows are in one line.
            return self._added(output[0], x[0], index, down, up).unsqueeze(0)
        elif x.shape[0] != self._rows:
            raise BackendError(
                f"a layer sees {x.shape[0]} rows of {self._rows}: adapters cannot be mixed on this model"
            )
        # Layers may be spread over devices.
        index = index.to(x.device)
        return output.index_add(0, index, (x[index].to(down.dtype) @ down @ up).to(output.dtype))


def _note(called: set[str], name: str, *_: Any) -> None:
    called.add(name)


def _settings(directory: Path) -> Any:
    try:
        return json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"adapter {directory} cannot be read: {error}") from error


def _equal(module: Any, weight: torch.Tensor) -> bool:
    own = getattr(module, "weight", None)
    if own is None or own.shape != weight.shape:
        return False
    return bool(torch.equal(dense(own).cpu(), weight.to(own.dtype)))


def _device(module: Any) -> torch.device | None:
    """Where the weight of a linear layer is; None if it is none."""
    if isinstance(module, LinearPart):
        # To ask it for its weight would unpack that of the whole product.
        return module.device
    weight = None if isinstance(module, torch.nn.Embedding) else getattr(module, "weight", None)
    return None if weight is None else torch.device(weight.device)


def _size(module: Any) -> tuple[int, int]:
    """Values that a linear layer takes and gives. Quantized weights are packed, so their shape does not tell."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)
    # The one-dimensional convolution of GPT-2 is a linear layer with its weight the other way round.
    return int(module.weight.shape[0]), int(module.weight.shape[1])


def _pattern(patterns: dict[str, float] | None, layer: str, default: float) -> float:
    """PEFT's exceptions by layer: a key is an expression for the end of the layer's name."""
    for key, value in (patterns or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{key})", layer):
            return float(value)
    return default
