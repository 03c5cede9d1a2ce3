"""A ModelWorker that breaks when it is told to, for tests with real processes."""

from __future__ import annotations

import threading
from typing import Any

from zfabric.backends.hf_transformers.cache.paged_cache import PagedCache
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.wire.payloads import OperateRequest


class BreakingWorker(ModelWorker):
    """Its call `break_at` has the first pass whose longest row is longer than so many columns go wrong, once."""

    async def operate(self, request: OperateRequest) -> Any:
        if request.call != "break_at":
            return await super().operate(request)
        columns, how = int(request.arguments["columns"]), str(request.arguments["how"])
        assert self._assembled is not None
        model = self._assembled.loaded.model

        def go_wrong(_: Any, __: Any, given: dict[str, Any]) -> None:
            cache = given["past_key_values"]
            passed = cache.passed if isinstance(cache, PagedCache) else None
            # Over pages the newest token of each row is counted already.
            if (cache.get_seq_length() if passed is None else max(passed.lengths) - 1) <= columns:
                return
            handle.remove()
            if how == "hang":
                threading.Event().wait()
            raise SystemExit("killed") if how == "die" else ValueError("broken")

        handle = model.register_forward_pre_hook(go_wrong, with_kwargs=True)
        return None
