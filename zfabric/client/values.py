"""A caller's values as what they are: plain ones of the type that a parameter has, or an error that names it.

NumPy arrays and scalars, torch tensors, and whatever else has `tolist` or `__index__` are taken for the lists and numbers
that they are; none of these libraries is imported. What is taken can be sent, and decodes where it arrives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, get_args

from zfabric.errors import FabricError, ParameterRangeError, RequestError
from zfabric.limits import NAME_LENGTH_MAX, NESTING_MAX, TOKEN_ID_MAX
from zfabric.wire.plain import plain_integer

#: Integers that the wire has.
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1

Take = Callable[[str, object], Any]


def taken(take: Take, name: str, value: object) -> Any:
    """A caller's value by one of the functions below. Raises: RequestError, also where the value itself raises."""
    try:
        return take(name, value)
    except FabricError:
        raise
    except Exception as error:
        raise _unreadable(name, error) from error


def wrong(name: str, value: object, wanted: str) -> RequestError:
    """What to raise for a value of another type. The parameter is the name up to the first bracket or dot."""
    shown = f"a {type(value).__name__}" if value is not None else "None"
    return RequestError(f"{name} is {shown}, it must be {wanted}", parameter=_parameter(name))


def out_of_range(name: str, value: object, bound: str) -> ParameterRangeError:
    """What to raise for a value outside its bounds."""
    return ParameterRangeError(f"{name} is {_short(value)}, it must be {bound}", parameter=_parameter(name))


def text(name: str, value: object) -> str:
    """A text that can be sent. Raises: RequestError."""
    if type(value) is not str:
        value = _unwrapped(name, value)
        if not isinstance(value, str):
            raise wrong(name, value, "a text")
        value = str.__str__(value)
    plain: str = value
    if not plain.isascii():
        try:
            plain.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{name} has half a character at position {error.start}", parameter=_parameter(name), at=error.start
            ) from None
    return plain


def a_name(name: str, value: object) -> str:
    """A text that fits where names go. Raises: RequestError, ParameterRangeError."""
    plain = text(name, value)
    if len(plain) > NAME_LENGTH_MAX:
        raise out_of_range(f"length of {name}", len(plain), f"at most {NAME_LENGTH_MAX}")
    return plain


def whole(name: str, value: object) -> int:
    """A whole number; no truth value, and no float even if it has no fraction. Raises: RequestError."""
    number = value if type(value) is int else _index_of(name, value)
    if not _INT_MIN <= number <= _INT_MAX:
        raise out_of_range(name, number, "a number of 64 bits")
    return number


def _index_of(name: str, value: object) -> int:
    """What a value of another type than `int` counts as. Raises: RequestError."""
    value = _unwrapped(name, value)
    if isinstance(value, (bool, float, str)) or not hasattr(type(value), "__index__"):
        raise wrong(name, value, "a whole number")
    index: int = taken(lambda _, given: plain_integer(given), name, value)
    return index


def number(name: str, value: object) -> float:
    """A finite number. Raises: RequestError, ParameterRangeError."""
    value = _unwrapped(name, value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise out_of_range(name, value, "a finite number")
        return float(value)
    if isinstance(value, (bool, str)) or not hasattr(type(value), "__index__"):
        raise wrong(name, value, "a number")
    try:
        return float(whole(name, value))
    except RequestError:
        raise out_of_range(name, value, "a number of 64 bits") from None


def flag(name: str, value: object) -> bool:
    """True or False. Raises: RequestError."""
    value = _unwrapped(name, value)
    if not isinstance(value, bool):
        raise wrong(name, value, "True or False")
    return value


def sequence(name: str, value: object, wanted: str) -> list[object]:
    """The items of a list, a tuple or an array. Raises: RequestError."""
    value = _unwrapped(name, value)
    if not isinstance(value, (list, tuple)):
        raise wrong(name, value, wanted)
    return list(value)


def texts(name: str, value: object) -> tuple[str, ...]:
    """Texts; one text is a list of one. Raises: RequestError."""
    value = _unwrapped(name, value)
    if isinstance(value, str):
        return (text(name, value),)
    items = sequence(name, value, "a text or a list of texts")
    return tuple([text(f"{name}[{at}]", item) for at, item in enumerate(items)])


def token(name: str, value: object) -> int:
    """A token's number. Raises: RequestError, ParameterRangeError."""
    plain = whole(name, value)
    if not 0 <= plain <= TOKEN_ID_MAX:
        raise out_of_range(name, plain, f"0 … {TOKEN_ID_MAX}")
    return plain


def tokens(name: str, value: object) -> list[int]:
    """Token ids. Raises: RequestError, ParameterRangeError."""
    items: list[Any] = sequence(name, value, "a list of token ids")
    # The usual case without a call for each: a prompt has tens of thousands.
    if set(map(type, items)) == {int} and min(items) >= 0 and max(items) <= TOKEN_ID_MAX:
        return items
    return [token(f"{name}[{at}]", item) for at, item in enumerate(items)]


def some_tokens(name: str, value: object) -> tuple[int, ...]:
    """Token ids; one number is a list of one. Raises: RequestError, ParameterRangeError."""
    value = _unwrapped(name, value)
    return (token(name, value),) if hasattr(type(value), "__index__") else tuple(tokens(name, value))


def biases(name: str, value: object) -> dict[int, float]:
    """Token ids and what is added to their logits, minus infinity for never. Raises: RequestError, ParameterRangeError."""
    if not isinstance(value, Mapping):
        raise wrong(name, value, "a map of token ids to numbers")
    taken: dict[int, float] = {}
    for key, item in value.items():
        place = f"{name}[{_short(key)}]"
        bias = _unwrapped(place, item)
        taken[token(place, key)] = bias if isinstance(bias, float) and bias == -math.inf else number(place, bias)
    return taken


def optional(take: Take) -> Take:
    """The same, where None is a value too."""
    return lambda name, value: None if value is None else take(name, value)


def one_of(allowed: tuple[str, ...]) -> Take:
    """One of some texts."""

    def take(name: str, value: object) -> str:
        plain = text(name, value)
        if plain not in allowed:
            raise out_of_range(name, plain, f"one of {', '.join(map(repr, allowed))}")
        return plain

    return take


def take_for(kind: object) -> Take:
    """How to take a value for a field that is declared so. Raises: KeyError for a declaration that is not known."""
    arguments = get_args(kind)
    if type(None) in arguments:
        rest = [argument for argument in arguments if argument is not type(None)]
        return optional(take_for(rest[0]))
    if arguments and all(isinstance(argument, str) for argument in arguments):
        return one_of(arguments)
    return _TAKES[kind]


_TAKES: Final[dict[object, Take]] = {
    bool: flag,
    int: whole,
    float: number,
    str: text,
    tuple[str, ...]: texts,
    tuple[int, ...]: some_tokens,
    dict[int, float]: biases,
}


def structure(name: str, value: object, *, binary: bool = False) -> Any:
    """Lists, maps, texts and numbers inside one another.

    Args:
        binary: Whether bytes are allowed: images are.

    Raises:
        RequestError: Anything else, anywhere in it; or it contains itself.
    """
    try:
        return _structure(value, binary, NESTING_MAX)
    except _OddError as odd:
        raise odd.as_error(name) from None


class _OddError(Exception):
    """Something in a structure that cannot be sent. Its path is put together on the way out: few structures have one."""

    def __init__(self, take: Take, value: object, path: str = "") -> None:
        super().__init__()
        self._take = take
        self._value = value
        self.path = path

    def as_error(self, name: str) -> FabricError:
        try:
            self._take(name + self.path, self._value)
        except FabricError as error:
            return error
        raise AssertionError("what was odd is not")


def _structure(value: object, binary: bool, depth: int) -> Any:
    take: Take = _unwrapped
    try:
        value = _unwrapped("", value)
        if isinstance(value, (list, tuple)):
            return _list(value, binary, depth)
        if isinstance(value, Mapping):
            return _map(value, binary, depth)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, float):
            return float(value)
        if binary and isinstance(value, (bytes, bytearray, memoryview)):
            return bytes(value)
        take = text if isinstance(value, str) else whole if hasattr(type(value), "__index__") else _nothing_known
        return take("", value)
    except FabricError:
        raise _OddError(take, value) from None


def _list(items: list[Any] | tuple[Any, ...], binary: bool, depth: int) -> list[Any]:
    if not depth:
        raise _OddError(_too_deep, items)
    kinds = set(map(type, items))
    if kinds == {float} or (kinds == {int} and min(items) >= _INT_MIN and max(items) <= _INT_MAX):
        # What an array was, without a call for each of its numbers.
        return list(items)
    taken: list[Any] = []
    for at, item in enumerate(items):
        try:
            taken.append(_structure(item, binary, depth - 1))
        except _OddError as odd:
            odd.path = f"[{at}]{odd.path}"
            raise
    return taken


def _map(items: Mapping[Any, Any], binary: bool, depth: int) -> dict[str, Any]:
    if not depth:
        raise _OddError(_too_deep, items)
    taken: dict[str, Any] = {}
    for key, item in items.items():
        if not isinstance(key, str):
            raise _OddError(_no_key, key)
        try:
            name = text("", key)
        except FabricError:
            raise _OddError(text, key, f".{_short(key)}") from None
        try:
            taken[name] = _structure(item, binary, depth - 1)
        except _OddError as odd:
            odd.path = f".{name[:80]}{odd.path}"
            raise
    return taken


def _nothing_known(name: str, value: object) -> Any:
    raise wrong(name, value, "a text, a number, a list or a map")


def _no_key(name: str, value: object) -> Any:
    raise wrong(f"{name} has a key that", value, "a text")


def _too_deep(name: str, value: object) -> Any:
    raise RequestError(f"{name} lies deeper than {NESTING_MAX} lists and maps", parameter=_parameter(name))


def _unwrapped(name: str, value: object) -> object:
    """What an array or one of its scalars holds, as lists and numbers."""
    if type(value) in _PLAIN:
        return value
    tolist = getattr(value, "tolist", None)
    if not callable(tolist) or isinstance(value, (type, memoryview)):
        return value
    return taken(lambda *_: tolist(), name, value)


_PLAIN: Final = frozenset({str, int, float, bool, list, tuple, dict, type(None)})


def _unreadable(name: str, error: Exception) -> RequestError:
    """What to raise where the value itself raises."""
    return RequestError(f"{name} cannot be read: {error}", parameter=_parameter(name))


def _parameter(name: str) -> str:
    """The parameter in a path such as `messages[1].content`."""
    return name.removeprefix("length of ").split("[", 1)[0].split(".", 1)[0].split(" ", 1)[0]


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:79]}…"
