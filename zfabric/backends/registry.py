"""Names of the backends that ship, and how any other is found: ``package.module:Class``."""

from __future__ import annotations

import importlib
from typing import Final

from zfabric.errors import ConfigurationError
from zfabric.worker.base import BaseModelWorker

BACKENDS: Final[dict[str, str]] = {
    "echo": "zfabric.backends.echo:EchoWorker",
    "hf-api": "zfabric.backends.hf_api.worker:HuggingfaceApiWorker",
    "transformers": "zfabric.backends.hf_transformers.worker:ModelWorker",
    "vllm": "zfabric.backends.vllm_engine.worker:VLLMWorker",
}


def backend_class(name: str) -> type[BaseModelWorker]:
    """The class behind a backend's name.

    Raises:
        ConfigurationError: No such name, module or class, or not a BaseModelWorker.
    """
    path = BACKENDS.get(name, name)
    module_name, separator, class_name = path.partition(":")
    if not separator:
        known = ", ".join(sorted(BACKENDS))
        raise ConfigurationError(f"backend {name!r} is neither one of {known} nor of the form package.module:Class")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigurationError(f"backend {name!r} cannot be imported: {error}", backend=name) from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, BaseModelWorker)):
        raise ConfigurationError(f"{path} is not a subclass of BaseModelWorker", backend=name)
    return found
