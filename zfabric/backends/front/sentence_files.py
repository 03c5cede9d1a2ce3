"""What the files of a sentence-transformers checkpoint say: its steps, its length, its prompts.

They lie beside the model's own files, in a directory or at a hub, and say what the model's configuration does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from zfabric.errors import ConfigurationError

#: Where the length is kept; older checkpoints name the file after their model.
_TEXT_FILES: Final = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
#: Steps that have some.
_WEIGHTED: Final = frozenset({"Dense", "LayerNorm"})
_WEIGHTS: Final = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the checkpoint.

    Attributes:
        kind: Name of its class, such as Pooling or Dense.
        settings: Its own configuration.
        weights: File of its weights, None if it has none.
    """

    kind: str
    settings: dict[str, Any]
    weights: Path | None = None


@dataclass(frozen=True, slots=True)
class SentenceFiles:
    """What was found.

    Attributes:
        steps: What is done to hidden states, in order; None where there is no such checkpoint.
        subfolder: Where the model itself lies.
        length: Tokens of one text, None if the files do not say.
        lower_case: Texts are put in lower case.
        prompts: What is put before texts, by purpose.
        prompt_name: Of the one that is put before each text unless another is asked for.
        family: SentenceTransformer, CrossEncoder, SparseEncoder …
        activation: What makes a score of what a CrossEncoder computes, as the path of a class.
    """

    steps: tuple[Step, ...] | None = None
    subfolder: str = ""
    length: int | None = None
    lower_case: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    prompt_name: str | None = None
    family: str = "SentenceTransformer"
    activation: str | None = None


class _Files:
    """Files of one repository or directory."""

    def __init__(self, name: str, hub: Mapping[str, Any]) -> None:
        self._name = name
        self._hub = {key: hub[key] for key in ("revision", "token", "cache_dir") if hub.get(key)}

    def path(self, *parts: str) -> Path | None:
        """Where a file lies, None if there is none.

        Raises:
            OSError: It cannot be found out whether there is one.
        """
        wanted = "/".join(part for part in parts if part)
        directory = Path(self._name)
        if directory.is_dir():
            return directory / wanted if (directory / wanted).is_file() else None
        return self._of_hub(wanted)

    def _of_hub(self, wanted: str) -> Path | None:
        from huggingface_hub import file_download
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(file_download.hf_hub_download(self._name, wanted, **self._hub))
        except LocalEntryNotFoundError:
            # Without a connection, what is not in the cache may be at the hub, unless that has said that it is not.
            known = {key: value for key, value in self._hub.items() if key != "token"}
            if isinstance(file_download.try_to_load_from_cache(self._name, wanted, **known), str | None):
                raise
            return None
        except EntryNotFoundError:
            return None
        except HFValidationError as error:
            raise OSError(str(error)) from error

    def json(self, *parts: str) -> Any:
        """What a file holds. Raises: OSError, ValueError."""
        path = self.path(*parts)
        return None if path is None else json.loads(path.read_text(encoding="utf-8"))

    def settings(self, *parts: str) -> dict[str, Any]:
        """The same of a file that need not be there. Raises: ValueError."""
        try:
            return self.json(*parts) or {}
        except OSError:
            # Whoever brought modules.json into the cache brought all that there is.
            return {}


def read(name: str, hub: Mapping[str, Any]) -> SentenceFiles:
    """Read them.

    Args:
        name: A directory, or a model's name at a hub.
        hub: Arguments of from_pretrained that say which one: `revision`.

    Raises:
        ConfigurationError: They are not what such files hold.
        OSError: A hub that cannot be asked, and nothing of the kind in its cache.
    """
    files = _Files(name, hub)
    modules = files.json("modules.json")
    if modules is None:
        return SentenceFiles()
    try:
        return _read(files, modules)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"the sentence-transformers files of {name!r} cannot be read: {error!r}") from error


def _read(files: _Files, modules: list[dict[str, Any]]) -> SentenceFiles:
    whole = files.settings("config_sentence_transformers.json")
    first, *others = sorted(modules, key=lambda module: int(module["idx"]))
    folder = str(first.get("path") or "")
    text: dict[str, Any] = next((found for file in _TEXT_FILES if (found := files.settings(folder, file))), {})
    steps = [_step(files, module) for module in others]
    kind = _kind(first)
    if kind != "Transformer":
        # It has to be refused where it is used, with all else that is not known.
        steps.insert(0, Step(kind, {}))
    length = text.get("max_seq_length")
    return SentenceFiles(
        steps=tuple(steps),
        subfolder=folder,
        length=int(length) if length else None,
        lower_case=bool(text.get("do_lower_case")),
        prompts={str(key): str(value or "") for key, value in (whole.get("prompts") or {}).items()},
        prompt_name=whole.get("default_prompt_name"),
        family=str(whole.get("model_type") or "SentenceTransformer"),
        activation=whole.get("activation_fn"),
    )


def _step(files: _Files, module: dict[str, Any]) -> Step:
    folder, kind = str(module.get("path") or ""), _kind(module)
    if not folder:
        return Step(kind, {})
    weights = next((path for file in _WEIGHTS if kind in _WEIGHTED and (path := files.path(folder, file))), None)
    return Step(kind, files.settings(folder, "config.json"), weights)


def _kind(module: dict[str, Any]) -> str:
    return str(module["type"]).rpartition(".")[2]
