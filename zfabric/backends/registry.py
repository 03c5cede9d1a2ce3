"""Names of the backends that ship, and how any other is found: ``package.module:Class``."""

from __future__ import annotations

import importlib
import inspect
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
        ConfigurationError: No such name, module or class, a module that cannot be imported for whatever reason, or a class
            that is no BaseModelWorker, or not a whole one.
    """
    path = BACKENDS.get(name, name)
    module_name, separator, class_name = path.partition(":")
    if not separator:
        known = ", ".join(sorted(BACKENDS))
        raise ConfigurationError(f"backend {name!r} is neither one of {known} nor of the form package.module:Class")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        why = error if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise ConfigurationError(f"backend {name!r} cannot be imported: {why}", backend=name) from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, BaseModelWorker)):
        raise ConfigurationError(f"{path} is not a subclass of BaseModelWorker", backend=name)
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ConfigurationError(f"{path} does not implement {missing}", backend=name)
    return found
