"""The models file: which upstreams there are. TOML or JSON, checked whole; FastChat's JSON is read as well."""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, get_args
from urllib.parse import urlsplit

from zfabric.errors import ConfigurationError
from zfabric.limits import NAME_LENGTH_MAX, SLOTS_MAX, WORKER_MODELS_MAX

Protocol = Literal["chat", "completions", "embeddings", "tgi", "feature-extraction", "tei"]
Server = Literal["openai", "vllm", "transformers", "tgi", "tei"]
Task = Literal["embed", "rerank", "classify"]

#: Who speaks the protocols that are one kind of server's own.
_OWN: Final[dict[str, Server]] = {"tgi": "tgi", "feature-extraction": "tgi", "tei": "tei"}

_SECRET_LENGTH_MIN: Final = 8


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """One model behind one URL.

    Attributes:
        name, aliases: What clients call it.
        base_url: Root of the API: ".../v1" for chat, completions and embeddings, that of the server for tei, the very URL
            for tgi and feature-extraction.
        protocol: What is spoken there.
        server: Whose dialect: which parameters there are, and how they are called.
        model: What the server calls it.
        token: Sent as a bearer; read from `token_env` or `token_file`. No repr shows it.
        headers: Sent with every request; no repr shows them, since they may hold secrets too.
        context_length: Tokens of prompt and answer, 0 if unknown.
        dimensions: Length of an embedding, 0 if unknown.
        slots: Concurrent requests.
        connect_ms, first_token_ms, between_tokens_ms: How long to wait for a connection, then for the first event, then
            for each further one. Comments and keep-alives do not count as events.
        attempts: Tries of one request before its first token.
        probe_path: What is asked for while the upstream is taken out, relative to base_url.
        batch_size, parallel: Inputs per embedding call, and such calls at the same time.
        tokenizer: Directory of the model's tokenizer.
        server_stops: Whether stop strings are sent to the server as well; they are applied here in any case.
        multimodal: Whether the model takes images; only then are messages with some sent to it.
        parameters: Narrows the parameters that the dialect honours; None for all of them.
        task: What a server of Text Embeddings Inference has its model for.
        reasoning: The model thinks before it answers, as OpenAI's do: its answers are bounded by `max_completion_tokens`,
            and nobody sets how it draws. Found out by itself, if the server says so.
        api_version: Azure's: goes with every request, and the token as its `api-key`.
    """

    name: str
    base_url: str
    aliases: tuple[str, ...] = ()
    protocol: Protocol = "chat"
    server: Server = "openai"
    model: str = ""
    token: str | None = field(default=None, repr=False)
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    context_length: int = 0
    dimensions: int = 0
    slots: int = 64
    connect_ms: int = 5_000
    first_token_ms: int = 120_000
    between_tokens_ms: int = 30_000
    attempts: int = 3
    probe_path: str = ""
    batch_size: int = 32
    parallel: int = 4
    tokenizer: str | None = None
    server_stops: bool = True
    multimodal: bool = False
    parameters: tuple[str, ...] | None = None
    task: Task = "embed"
    reasoning: bool = False
    api_version: str = ""

    @property
    def generates(self) -> bool:
        """Whether it makes text."""
        return self.protocol in ("chat", "completions", "tgi")

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not be shown. A header's value that is short is no secret, but a word that messages may hold."""
        values = [value for value in self.headers.values() if len(value) >= _SECRET_LENGTH_MIN]
        return tuple(([self.token] if self.token else []) + values)


_COUNTS: Final[dict[str, tuple[int, int]]] = {
    "context_length": (0, 2**31),
    "dimensions": (0, 2**20),
    "slots": (1, SLOTS_MAX),
    "connect_ms": (1, 3_600_000),
    "first_token_ms": (1, 3_600_000),
    "between_tokens_ms": (1, 3_600_000),
    "attempts": (1, 20),
    "batch_size": (1, 4_096),
    "parallel": (1, 256),
}
_CHOICES: Final = {"protocol": get_args(Protocol), "server": get_args(Server), "task": get_args(Task)}
_TEXTS: Final = ("base_url", "model", "probe_path", "tokenizer", "token_env", "token_file", "api_version")
_LISTS: Final = ("aliases", "parameters")
_KEYS: Final = ({f.name for f in fields(Upstream)} - {"name", "token"}) | {"token_env", "token_file"}
#: What FastChat calls things. Its conversation templates are for models; an API has its own.
_FASTCHAT: Final = frozenset({"model_path", "api_base", "token", "context_length", "model_names", "conv_template"})


def read_models_file(path: Path) -> list[Upstream]:
    """All entries of the file.

    Raises:
        ConfigurationError: Names the entry and the key; no value of a token or a header is in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        # A decoder's message may quote a line, and the line may hold a secret: say what, not which.
        raise ConfigurationError(f"models file {path} cannot be read: {_reason(error)}", file=str(path)) from None
    entries = document.get("models", document) if isinstance(document, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise ConfigurationError(f"models file {path} has no table of models", file=str(path))
    if len(entries) > WORKER_MODELS_MAX:
        raise ConfigurationError(f"models file {path} has {len(entries)} models, {WORKER_MODELS_MAX} are allowed")
    upstreams = [_upstream(name, entry, path.parent) for name, entry in entries.items()]
    owners: dict[str, str] = {}
    for upstream in upstreams:
        for name in (upstream.name, *upstream.aliases):
            if name in owners:
                raise _wrong(upstream.name, "aliases", f"{name!r} is a name of {owners[name]!r} already")
            owners[name] = upstream.name
    return upstreams


def _upstream(name: str, entry: Any, directory: Path) -> Upstream:
    if not isinstance(entry, dict):
        raise _wrong(name, "", "is not a table")
    if not 1 <= len(name) <= NAME_LENGTH_MAX:
        raise _wrong(name, "", f"has a name of {len(name)} characters, 1 … {NAME_LENGTH_MAX} are allowed")
    if "api_base" in entry:
        return _from_fastchat(name, entry)
    for key, value in entry.items():
        _check(name, key, value)
    _check_url(name, "base_url", entry.get("base_url"))
    given = {key: value for key, value in entry.items() if key not in ("token_env", "token_file")}
    for key in _LISTS:
        if key in given:
            given[key] = tuple(given[key])
    if given.get("tokenizer"):
        given["tokenizer"] = str(directory / given["tokenizer"])
    protocol = given.get("protocol", "chat")
    own = _OWN.get(protocol)
    server = given.setdefault("server", own or "openai")
    if server != own and (own or server in _OWN.values()):
        raise _wrong(name, "server", f"{server!r} does not speak {protocol!r}")
    if "task" in given and protocol != "tei":
        raise _wrong(name, "task", f"goes with protocol 'tei', not {protocol!r}")
    if given.get("reasoning") and (protocol, server) != ("chat", "openai"):
        raise _wrong(name, "reasoning", f"goes with 'chat' of 'openai', not {protocol!r} of {server!r}")
    given.setdefault("model", name)
    return Upstream(name=name, token=_token(name, entry, directory), **given)


def _check(name: str, key: str, value: Any) -> None:
    """One key by its kind."""
    if key == "token":
        raise _wrong(name, key, "is not allowed in the file; name a variable with token_env, or a file with token_file")
    if key not in _KEYS:
        raise _wrong(name, key, "is unknown; known are " + ", ".join(sorted(_KEYS)))
    if key in _COUNTS:
        low, high = _COUNTS[key]
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise _wrong(name, key, f"is {value!r}, it must be an integer of {low} … {high}")
    elif key in _CHOICES:
        if value not in _CHOICES[key]:
            raise _wrong(name, key, f"is {value!r}, it must be one of " + ", ".join(_CHOICES[key]))
    elif key in _TEXTS:
        if not isinstance(value, str):
            raise _wrong(name, key, "must be a string")
    elif key in _LISTS:
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise _wrong(name, key, "must be a list of strings")
    elif key == "headers":
        _check_headers(name, value)
    elif not isinstance(value, bool):
        raise _wrong(name, key, "must be true or false")


def _check_headers(name: str, value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise _wrong(name, "headers", "must be a table of strings")
    if any(not 32 <= ord(character) <= 126 for pair in value.items() for character in "".join(pair)):
        raise _wrong(name, "headers", "must be printable ASCII")


def _check_url(name: str, key: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise _wrong(name, key, "is missing")
    try:
        parts = urlsplit(value)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise _wrong(name, key, "must be an http or https URL")
    if parts.username or parts.password:
        raise _wrong(name, key, "must not hold credentials; use token_env or token_file")


def _token(name: str, entry: dict[str, Any], directory: Path) -> str | None:
    variable, file = entry.get("token_env"), entry.get("token_file")
    if variable and file:
        raise _wrong(name, "token_file", "is set beside token_env")
    if variable:
        if not os.environ.get(variable):
            raise _wrong(name, "token_env", f"names the variable {variable!r}, which is not set")
        return _checked_token(name, "token_env", os.environ[variable])
    if file:
        try:
            return _checked_token(name, "token_file", (directory / file).read_text().strip())
        except (OSError, ValueError) as error:
            raise _wrong(name, "token_file", f"{file!r} cannot be read: {_reason(error)}") from None
    return None


def _checked_token(name: str, key: str, token: str) -> str:
    """A token that fits into a header."""
    if not token or any(not 33 <= ord(character) <= 126 for character in token):
        raise _wrong(name, key, "leads to a token that is empty or has blanks or signs beyond ASCII")
    return token


def _from_fastchat(name: str, entry: dict[str, Any]) -> Upstream:
    """An entry as FastChat's --model-info-file has it. It speaks text generation at api_base/model_path."""
    for key in entry:
        if key not in _FASTCHAT:
            raise _wrong(name, key, "is unknown beside api_base; known are " + ", ".join(sorted(_FASTCHAT)))
    for key in ("model_path", "api_base"):
        if not isinstance(entry.get(key), str):
            raise _wrong(name, key, "must be a string")
    _check_url(name, "api_base", entry["api_base"])
    _check(name, "context_length", entry.get("context_length"))
    names = entry.get("model_names") or [name]
    names = names.split(",") if isinstance(names, str) else names
    _check(name, "aliases", names)
    token = entry.get("token") or None
    if token is not None:
        if not isinstance(token, str):
            raise _wrong(name, "token", "must be a string")
        token = _checked_token(name, "token", token)
    path = entry["model_path"].strip("/")
    base = entry["api_base"].rstrip("/")
    return Upstream(
        name=names[0],
        aliases=tuple(names[1:]),
        base_url=f"{base}/{path}" if path else base,
        protocol="tgi",
        server="tgi",
        model=path,
        token=token,
        context_length=entry["context_length"],
    )


def _wrong(name: str, key: str, what: str) -> ConfigurationError:
    place = f"model {name!r}, {key}" if key else f"model {name!r}"
    return ConfigurationError(f"{place}: {what}", model=name, key=key)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (line {error.lineno})"
    return str(error) if isinstance(error, tomllib.TOMLDecodeError) else type(error).__name__
