"""Which backend of a worker serves which model, and what is announced of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from msgspec import structs

from zfabric.errors import ConfigurationError, RequestError, UnknownModelError
from zfabric.wire.messages import ModelInfo
from zfabric.worker.base import BaseModelWorker
from zfabric.worker.capabilities import PARAMETERS, check_announcement


class Served(NamedTuple):
    """Who serves a name, and what it can do.

    Attributes:
        backend: Whose model it is.
        label: What errors call the model.
        capabilities: As announced.
        parameters: That may be handed over; all of them where the model does not tell.
        seeded: Whether it draws by the seed that it is given.
        defaults: Its own values of parameters.
        extra: Keys of a request's `extra` that may be handed over; None for any.
    """

    backend: BaseModelWorker
    label: str
    capabilities: frozenset[str]
    parameters: frozenset[str]
    seeded: bool
    defaults: Mapping[str, float]
    extra: frozenset[str] | None


class ServedModels:
    """The models of one worker, as they are announced. It never changes: another set is another object.

    Args:
        worker: The worker's name, for errors.
        backends: All backends; their order gives engines their numbers.
        models: What each of them serves, in the same order.

    Raises:
        ConfigurationError: Two models have the same name, what a backend names is no model, or it cannot do what it
            announces.
    """

    def __init__(self, worker: str, backends: Sequence[BaseModelWorker], models: Sequence[Sequence[ModelInfo]]) -> None:
        self._worker = worker
        self._backends = tuple(backends)
        self._models = tuple(tuple(infos) for infos in models)
        self._route: dict[str, Served] = {}
        #: What the controller is told.
        self.announced: list[ModelInfo] = []
        for engine, (backend, infos) in enumerate(zip(self._backends, self._models, strict=True)):
            for info in infos:
                self._add(engine, backend, info)

    def replaced(self, backend: BaseModelWorker, infos: Sequence[ModelInfo]) -> ServedModels:
        """The same, with other models of one backend. Raises: ConfigurationError, as above."""
        models = [
            infos if other is backend else known for other, known in zip(self._backends, self._models, strict=True)
        ]
        return ServedModels(self._worker, self._backends, models)

    def _add(self, engine: int, backend: BaseModelWorker, info: ModelInfo) -> None:
        kind = type(backend).__name__
        if not isinstance(info, ModelInfo):
            raise ConfigurationError(f"{kind} names {type(info).__name__} as a model, it must be a ModelInfo")
        info = backend.announcement(info)
        check_announcement(backend, info)
        capabilities = frozenset(info.capabilities)
        parameters = PARAMETERS if info.parameters is None else frozenset(info.parameters)
        # A model that tells nothing of its parameters, and goes on with answers of others, must be able to draw them again.
        seeded = "seed" in parameters and (info.parameters is not None or "resume" in capabilities)
        extra = None if info.extra is None else frozenset(info.extra)
        served = Served(backend, f"model {info.name!r}", capabilities, parameters, seeded, dict(info.defaults), extra)
        for name in (info.name, *info.aliases):
            if name in self._route:
                raise ConfigurationError(f"two models of this worker are named {name!r}", model=name)
            self._route[name] = served
        self.announced.append(structs.replace(info, engine=engine))

    @property
    def names(self) -> list[str]:
        """All names and aliases, for logs."""
        return sorted(self._route)

    def find(self, model: str) -> Served:
        """Who serves a model.

        Raises:
            UnknownModelError: Nobody here.
            RequestError: None is named, and there are several.
        """
        if not model:
            return self._only()
        found = self._route.get(model)
        if found is None:
            raise UnknownModelError(f"worker {self._worker!r} does not serve {model!r}", model=model)
        return found

    def for_call(self, model: str) -> BaseModelWorker:
        """Who gets an operator's call: the backend of the model, or without one the only backend that has calls.

        Raises:
            UnknownModelError: Nobody here serves the model.
            RequestError: No model is named, and several backends have calls.
        """
        if model:
            return self.find(model).backend
        able = [b for b in self._backends if type(b).operate is not BaseModelWorker.operate] or self._backends[:1]
        if len(able) > 1:
            raise self._ambiguous()
        return able[0]

    def _only(self) -> Served:
        if not self._route:
            raise UnknownModelError(f"worker {self._worker!r} serves no model now")
        if len(self.announced) > 1:
            raise self._ambiguous()
        return next(iter(self._route.values()))

    def _ambiguous(self) -> RequestError:
        names = ", ".join(info.name for info in self.announced)
        return RequestError(f"worker {self._worker!r} serves several models: name one of {names}", parameter="model")
