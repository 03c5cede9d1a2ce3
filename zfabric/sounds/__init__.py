"""Sounds: files of them made into samples."""

from __future__ import annotations

from zfabric.sounds.files import samples_of

__all__ = ["samples_of"]
