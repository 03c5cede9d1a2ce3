"""What an operator can set on a recording."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zfabric import limits
from zfabric.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class RecordingConfig:
    """Where a recording is kept, and how much of it.

    Attributes:
        file: Its newest part. Older parts are beside it, and have `.1`, `.2` and `.3` behind the name.
        bytes_max: What all parts take on disk at most.
        ms_max: How far it goes back at most.
    """

    file: Path
    bytes_max: int = limits.RECORD_BYTES_MAX
    ms_max: int = limits.RECORD_MS_MAX

    def __post_init__(self) -> None:
        for name, least in (("bytes_max", limits.RECORD_BYTES_MIN), ("ms_max", limits.RECORD_MS_MIN)):
            value = getattr(self, name)
            if value < least:
                raise ConfigurationError(f"record_{name} is {value}, it must be at least {least}", parameter=name)

    @property
    def parts(self) -> list[Path]:
        """The files, the newest first, whether they are there or not."""
        return part_names(self.file)


def part_names(file: Path) -> list[Path]:
    """The files of a recording, the newest first, whether they are there or not."""
    older = [file.with_name(f"{file.name}.{number}") for number in range(1, limits.RECORD_PARTS)]
    return [file, *older]


def recording_of(file: Path | None, bytes_max: int, ms_max: int) -> RecordingConfig | None:
    """What the flags of a daemon ask for. Raises: ConfigurationError, one is out of its bounds."""
    return RecordingConfig(file=file, bytes_max=bytes_max, ms_max=ms_max) if file is not None else None
