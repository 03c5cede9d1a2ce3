"""Bodies of forms (RFC 7578), as programs upload files with."""

from __future__ import annotations

import re
from typing import Final

from zfabric.errors import RequestError

#: Fields of one form; none here has as many.
_FIELDS_MAX: Final = 64
_BOUNDARY: Final = re.compile(rb'boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE)
_NAME: Final = re.compile(rb'[;\s]name="((?:[^"\\\r\n]|\\.){1,200})"', re.IGNORECASE)


def fields_of(content_type: bytes, body: bytes) -> list[tuple[str, bytes]]:
    """Names of fields and what they hold, in order; a file is one of them.

    Args:
        content_type: The header, which says what stands between fields.

    Raises:
        RequestError: It is no form, breaks off, or has too many fields.
    """
    found = _BOUNDARY.search(content_type)
    if not content_type.lower().startswith(b"multipart/form-data") or found is None:
        raise RequestError("the body must be a form: multipart/form-data with a boundary")
    mark = b"\r\n--" + (found[1] or found[2])
    begin, *parts = (b"\r\n" + body).split(mark, _FIELDS_MAX + 1)
    if not parts or begin.strip() or len(parts) > _FIELDS_MAX:
        raise RequestError(f"the body is not the form that its header says, or has more than {_FIELDS_MAX} fields")
    if not parts[-1].startswith(b"--"):
        raise RequestError("the form breaks off: what ends it is missing")
    return [_field(part) for part in parts[:-1]]


def _field(part: bytes) -> tuple[str, bytes]:
    head, blank, value = part.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-disposition:")]
    name = _NAME.search(lines[0]) if lines else None
    if not blank or name is None:
        raise RequestError("a field of the form has no name")
    return name[1].decode("utf-8", "replace"), value
