"""Weights in 8 or 4 bits: made so while a model is loaded, by quantizers of transformers, or found so in a checkpoint.

Each of the first takes the linear layers but the last one, and leaves activations to the model's type, but for "8bit", and for
"fp8" where the device multiplies such numbers: these round each token's activations as well, by a scale of that token's own,
so that a row's company does not change it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any, Final, Literal

import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from zfabric.errors import ConfigurationError

Quantization = Literal["8bit", "4bit", "fp8", "int8", "int4"]
#: The package that each needs.
_PACKAGES: Final[dict[Quantization, str]] = {
    "8bit": "bitsandbytes",
    "4bit": "bitsandbytes",
    "fp8": "torchao",
    "int8": "torchao",
    "int4": "torchao",
}
#: From this compute capability on devices multiply FP8 by themselves.
_FP8_CAPABILITY: Final = (8, 9)


def arguments(
    name: Quantization | None, config: Any, device: str, dtype: torch.dtype | Literal["auto"], *, cpu_offload: bool
) -> dict[str, Any]:
    """What from_pretrained is told besides, where weights are quantized; weights go to the device as they are read.

    Args:
        name: Of what makes them so; None for a checkpoint's own.
        config: The model's.
        dtype: As it is asked for.
        cpu_offload: What no device has room for stays on the CPU ("8bit" alone).

    Raises:
        ConfigurationError: It does not go with the checkpoint, the device or the type, or its package is not there.
    """
    own = checkpoint_method(config)
    if own is not None and own not in {*AUTO_QUANTIZER_MAPPING, "bitsandbytes"}:
        # transformers would take packed weights for plain ones.
        raise ConfigurationError(f"the checkpoint's weights are quantized by {own}, which transformers does not know")
    if cpu_offload and name != "8bit":
        raise ConfigurationError("cpu_offload goes with quantization 8bit alone")
    if name is None:
        return {} if own is None else {"device_map": device}
    if own is not None:
        raise ConfigurationError(
            f"quantization {name!r} does not go with a checkpoint whose weights are quantized by {own}: it is served as "
            f"it is, without --quantization"
        )
    package = _PACKAGES[name]
    if importlib.util.find_spec(package) is None:
        raise ConfigurationError(f"quantization {name!r} needs {package}: pip install 'zfabric[quantized]'")
    computed = _computed(config, dtype)
    if name in ("8bit", "4bit"):
        made: dict[str, Any] = {"quantization_config": _bitsandbytes(name, computed, cpu_offload=cpu_offload)}
    else:
        made = _torchao(name, device, dtype, computed)
    return {"device_map": device, **made}


def checkpoint_method(config: Any) -> str | None:
    """What a checkpoint's weights are quantized by, as transformers calls it; None if they are not.

    Args:
        config: Of the checkpoint.
    """
    for part in (config, config.get_text_config()):
        told = getattr(part, "quantization_config", None)
        if told is not None:
            method = told.get("quant_method") if isinstance(told, dict) else told.quant_method
            return str(getattr(method, "value", method) or "a method that it does not name")
    return None


def told(model: Any, name: Quantization | None, own: str | None) -> dict[str, str | int]:
    """What a model's details say of its weights, if they were quantized: by what, and the bytes that they take.

    Args:
        model: As it was loaded.
        name: What made them so; None for a checkpoint's own.
        own: What those of the checkpoint are quantized by.
    """
    method = name or own
    if method is None:
        return {}
    settings = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if settings is None or getattr(settings, "dequantize", False):
        method += ", unpacked"
    return {"quantization": method, "weight_bytes": weight_bytes(model)}


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters and buffers, those counted once that share memory."""
    seen = {
        plain.untyped_storage().data_ptr(): plain.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
        for plain in _plain(tensor)
    }
    return sum(seen.values())


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that one is made of: quantized ones keep their scales beside."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        # What bitsandbytes keeps beside a packed weight.
        scales = getattr(getattr(tensor, "quant_state", None), "absmax", getattr(tensor, "SCB", None))
        if scales is not None:
            yield scales
        return
    for inner in flatten()[0]:
        part = getattr(tensor, inner)
        if isinstance(part, torch.Tensor):
            yield from _plain(part)


def _computed(config: Any, dtype: torch.dtype | Literal["auto"]) -> torch.dtype:
    """The type that activations have."""
    if dtype != "auto":
        return dtype
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return own if isinstance(own, torch.dtype) else torch.float32


def _bitsandbytes(name: Quantization, computed: torch.dtype, *, cpu_offload: bool) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_8bit=name == "8bit",
        load_in_4bit=name == "4bit",
        bnb_4bit_compute_dtype=computed,
        llm_int8_enable_fp32_cpu_offload=cpu_offload,
    )


def _torchao(
    name: Quantization, device: str, dtype: torch.dtype | Literal["auto"], computed: torch.dtype
) -> dict[str, Any]:
    from torchao import quantization
    from transformers import TorchAoConfig

    if name == "int8":
        return {"quantization_config": TorchAoConfig(quantization.Int8WeightOnlyConfig())}
    if name == "fp8":
        # Per row: with one scale for a whole pass a row would depend on its company. Those kernels take this type alone.
        if computed == torch.bfloat16 and _multiplies_fp8(device):
            scales = quantization.PerRow()
            how: Any = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=scales)
        else:
            how = quantization.Float8WeightOnlyConfig()
        return {"quantization_config": TorchAoConfig(how)}
    if not device.startswith("cuda"):
        raise ConfigurationError(
            f"quantization 'int4' needs a CUDA device, whose kernels alone read it, not {device!r}: 4bit takes a CPU as well"
        )
    if dtype not in ("auto", torch.bfloat16):
        raise ConfigurationError(f"quantization 'int4' computes in bfloat16 alone, not in {dtype}")
    packed = quantization.Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d")
    return {"quantization_config": TorchAoConfig(packed), "dtype": torch.bfloat16}


def _multiplies_fp8(device: str) -> bool:
    return device.startswith("cuda") and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY
