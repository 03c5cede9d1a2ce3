"""The only clock: monotonic, so that setting the wall clock changes nothing."""

from __future__ import annotations

import time

monotonic_ns = time.monotonic_ns
