"""Sounds: files of them made into samples, and long ones cut into pieces that a model hears one by one.

It knows no fabric: a worker reads with it what it is sent, the gateway cuts with it what is uploaded, and a program cuts what it
has.
"""

from __future__ import annotations

from zfabric.sounds.files import samples_of
from zfabric.sounds.pieces import HEARS_SECONDS, Piece, pieces_of

__all__ = ["HEARS_SECONDS", "Piece", "pieces_of", "samples_of"]
