"""Models with a head that judges texts: classifiers, cross-encoders and reward models.

What such a model computes of a text is a number for each of its labels (`logits`). An activation makes probabilities of
them. Sources: `get_act_fn` of vLLM, `CrossEncoder` of sentence-transformers, and the text-classification pipeline of
transformers agree on what follows, but for several labels without any setting, where sentence-transformers activates
nothing; here they are probabilities then, too.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final

import torch

from zfabric.backends.front.sentence_files import SentenceFiles
from zfabric.backends.hf_transformers.pooling.poolers import Pooler, activation_of
from zfabric.errors import ConfigurationError

Activation = Callable[[torch.Tensor], torch.Tensor]

#: What a configuration calls its problem → what makes probabilities of its numbers.
_BY_PROBLEM: Final[dict[str, Activation]] = {
    "regression": lambda logits: logits,
    "multi_label_classification": torch.sigmoid,
}


class Head:
    """A model with a head, as two parts: one that computes states of a batch, and one that makes logits of them.

    Args:
        model: Of transformers, for the classification of sequences.
        files: Files of a sentence-transformers checkpoint, which may name an activation.
        name: For messages.

    Attributes:
        reader: Computes states; it is called as the model itself is.
        pooler: Makes logits of the states.
        labels: What the labels are called, in their order.
        pad_token: A token that does not count where it ends a text, None if there is none.
        typed: Whether the model tells two texts apart by the types of their tokens.

    Raises:
        ConfigurationError: The activation is none of torch's own.
    """

    def __init__(self, model: Any, files: SentenceFiles, name: str) -> None:
        config = model.config
        names = config.id2label or {}
        self.labels = [str(names[index]) for index in sorted(names)]
        self.pad_token: int | None = None
        self.typed = "token_type_ids" in inspect.signature(model.forward).parameters
        self._activation = _activation(config, files, len(self.labels), name)
        score: Any = getattr(model, "score", None)
        if type(score) is torch.nn.Linear and model.base_model is not model:
            # A decoder's: the last token of a text has seen all of it. The model itself looks for that token by the
            # padding, and refuses a batch where it knows no padding.
            self.reader: Any = model.base_model
            self.pad_token = config.get_text_config().pad_token_id
            last = copy.deepcopy(score).float()
            self.pooler = Pooler(score.in_features, ["last"], head=last, dimensions=score.out_features)
        else:
            self.reader = _Whole(model)
            self.pooler = Pooler(len(self.labels), ["cls"])

    def probabilities(self, logits: torch.Tensor) -> list[list[float]]:
        """Of each row of logits, by the model's activation."""
        rows: list[list[float]] = self._activation(logits).tolist()
        return rows


class _Whole:
    """A model whose head needs all of it: its logits are the one state of a text."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, **arguments: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self._model(**arguments).logits.unsqueeze(1))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _activation(config: Any, files: SentenceFiles, count: int, name: str) -> Activation:
    """What makes probabilities of logits."""
    settings = getattr(config, "sentence_transformers", None) or {}
    former = getattr(config, "sbert_ce_default_activation_function", None)
    path = files.activation or settings.get("activation_fn") or former
    if path is not None:
        try:
            return activation_of(str(path))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"{name!r} cannot be served: {error}", model=name) from error
    by_default = torch.sigmoid if count < 2 else lambda logits: torch.softmax(logits, dim=-1)
    return _BY_PROBLEM.get(str(getattr(config, "problem_type", None)), by_default)
