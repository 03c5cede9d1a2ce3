"""Bodies of forms (RFC 7578), as programs upload files with: read by python-multipart, within bounds of this module."""

from __future__ import annotations

from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from zfabric.errors import RequestError

#: Fields of one form; none here has as many.
_FIELDS_MAX: Final = 64
#: Lines above a field's value, of which programs send two or three, and bytes of one of them.
_HEADERS_MAX: Final = 8
_HEADER_BYTES_MAX: Final = 1_024


def fields_of(content_type: bytes, body: bytes) -> list[tuple[str, bytes]]:
    """Names of fields and what they hold, in order; a file is one of them.

    Args:
        content_type: The header, which says what stands between fields.

    Raises:
        RequestError: It is no form, breaks off, or has too many fields.
    """
    kind, options = parse_options_header(content_type.decode("latin-1"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise RequestError("the body must be a form: multipart/form-data with a boundary")
    form = _Form()
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": form.begin,
                "on_header_field": form.header_name,
                "on_header_value": form.header_value,
                "on_header_end": form.header_end,
                "on_headers_finished": form.headers_end,
                "on_part_data": form.data,
                "on_part_end": form.end,
                "on_end": form.whole,
            },
            max_header_count=_HEADERS_MAX,
            max_header_size=_HEADER_BYTES_MAX,
        )
        parser.write(body)
    except FormParserError as error:
        raise RequestError(f"the body is not the form that its header says: {error}") from None
    if not form.ended:
        raise RequestError("the form breaks off: what ends it is missing")
    return form.fields


class _Form:
    """What the parser tells of.

    Attributes:
        fields: Those that are whole.
        ended: Whether what ends a form has come.
    """

    def __init__(self) -> None:
        self.fields: list[tuple[str, bytes]] = []
        self.ended = False
        self._header, self._value, self._name = b"", b"", b""
        self._parts: list[bytes] = []

    def begin(self) -> None:
        if len(self.fields) == _FIELDS_MAX:
            raise RequestError(f"the form has more than {_FIELDS_MAX} fields")
        self._header, self._value, self._name, self._parts = b"", b"", b"", []

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value.decode("latin-1"))
            self._name = options.get(b"name", b"")
        self._header, self._value = b"", b""

    def headers_end(self) -> None:
        if not self._name:
            raise RequestError("a field of the form has no name")

    def data(self, data: bytes, start: int, end: int) -> None:
        self._parts.append(data[start:end])

    def end(self) -> None:
        self.fields.append((self._name.decode("utf-8", "replace"), b"".join(self._parts)))

    def whole(self) -> None:
        self.ended = True
