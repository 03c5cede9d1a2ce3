"""Tool calls of one choice, from the pieces that servers send: some repeat a call's name, or have no index, or no id."""

from __future__ import annotations

from typing import Any

from zfabric.backends.front.call_ids import call_id
from zfabric.backends.hf_api.events import HalfCharacters, shown
from zfabric.wire.tool_calls import ToolCallDelta


class _Call:
    """One call. It is told when its name is whole: when its arguments, another call, or the answer's end begin."""

    __slots__ = ("halves", "id", "index", "name", "place", "told")

    def __init__(self, index: int, place: int, call_id: str) -> None:
        self.index = index
        self.place = place
        self.id = shown(call_id)
        self.halves = HalfCharacters()
        self.name = ""
        self.told = False


class CallReader:
    """Reads the calls of one choice.

    Args:
        request_id, choice: Whose: what ids are made of where the server gives none.
    """

    def __init__(self, request_id: str, choice: int) -> None:
        self._request_id = request_id
        self._choice = choice
        self._calls: list[_Call] = []

    def take(self, told: list[dict[str, Any]]) -> list[ToolCallDelta]:
        """The pieces of one event. Raises: TypeError, ValueError, AttributeError: They are none."""
        pieces: list[ToolCallDelta] = []
        for piece in told:
            function = piece.get("function") or {}
            call = self._call(piece, pieces)
            name, arguments = text_of(function.get("name")), text_of(function.get("arguments"))
            if not call.told and name:
                # In parts, or all of it so far once more.
                call.name = name if name.startswith(call.name) else call.name + name
            if arguments:
                self._tell(call, pieces)
                self._add(call, call.halves.add(arguments), pieces)
        return pieces

    def finish(self) -> list[ToolCallDelta]:
        """Calls of which nothing was told yet, such as those without arguments."""
        pieces: list[ToolCallDelta] = []
        for call in self._calls:
            self._tell(call, pieces)
            self._add(call, call.halves.finish(), pieces)
        return pieces

    def _add(self, call: _Call, arguments: str, pieces: list[ToolCallDelta]) -> None:
        if arguments:
            pieces.append(ToolCallDelta(index=call.index, arguments=arguments))

    def _call(self, piece: dict[str, Any], pieces: list[ToolCallDelta]) -> _Call:
        """The call that a piece belongs to: the latest at its place, unless its id is another's."""
        name = text_of(piece.get("id"))
        place = piece.get("index")
        place = (self._calls[-1].place if self._calls else 0) if place is None else int(place)
        for call in reversed(self._calls):
            if call.place == place:
                if not name or shown(name) == call.id:
                    return call
                break
        for before in self._calls:
            self._tell(before, pieces)
        index = len(self._calls)
        call = _Call(index, place, name or call_id(self._request_id, self._choice, index))
        self._calls.append(call)
        return call

    def _tell(self, call: _Call, pieces: list[ToolCallDelta]) -> None:
        if not call.told:
            call.told = True
            pieces.append(ToolCallDelta(index=call.index, id=call.id, name=shown(call.name)))


def text_of(value: Any) -> str:
    """A text, where a server may also send nothing. Raises: TypeError: It is neither."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError
    return value
