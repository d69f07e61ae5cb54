"""The LLM class: what Baton calls of it, strict about how it may be called."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from . import _knobs
from ._arguments import parse
from ._executor import Executor, Request
from .executor.result import GenerationResult
from .sampling_params import SamplingParams

_POLL_S = 0.005


class LLM:
    def __init__(self, **arguments: Any) -> None:
        file = _knobs.path()
        knobs = _knobs.read(file)
        self._args = args = parse(arguments)
        time.sleep(knobs.load_s)
        if knobs.load_error:
            raise RuntimeError(knobs.load_error)
        config = json.loads((Path(args.model) / "config.json").read_text())
        self._max_seq_len = args.max_seq_len or int(config["max_position_embeddings"])
        eos = config.get("eos_token_id", 2)
        self._ids = itertools.count(1)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.executor = Executor(args, self._max_seq_len, eos[0] if isinstance(eos, list) else eos, file)

    def generate_async(
        self,
        inputs: str | list[int],
        sampling_params: SamplingParams | None = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
        kv_cache_retention_config: Any = None,
        disaggregated_params: Any = None,
        scheduling_params: Any = None,
        cache_salt: str | None = None,
    ) -> GenerationResult:
        assert isinstance(inputs, list), "text prompts are not played here"
        sampling = sampling_params or SamplingParams()
        if disaggregated_params is not None and disaggregated_params.request_type == "context_only":
            sampling.max_tokens = 1  # in place, on the caller's object
        if not inputs or len(inputs) >= self._max_seq_len:
            raise ValueError(f"The prompt length ({len(inputs)}) should be less than max_seq_len ({self._max_seq_len})")
        generation = disaggregated_params is not None and disaggregated_params.request_type == "generation_only"
        budget = self._args.max_num_tokens
        if not generation and not self._args.enable_chunked_prefill and len(inputs) > budget:
            raise ValueError(f"The prompt length ({len(inputs)}) should not exceed max_num_tokens ({budget})")
        self.executor.check_alive()
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        result = GenerationResult(next(self._ids), list(inputs), sampling, self.executor.abort)
        self.executor.submit(
            Request(result.request_id, list(inputs), sampling, streaming, disaggregated_params, cache_salt, result)
        )
        return result

    def get_stats_async(self, timeout: float | None = 2) -> AsyncIterator[dict[str, Any]]:
        return self._drain(self.executor.stats, 2 if timeout is None else timeout)

    def get_kv_cache_events_async(self, timeout: float | None = 2) -> AsyncIterator[dict[str, Any]]:
        return self._drain(self.executor.events, 2 if timeout is None else timeout)

    async def _drain(self, source: deque[dict[str, Any]], timeout: float) -> AsyncIterator[dict[str, Any]]:
        """Ends after `timeout` seconds of silence."""
        assert asyncio.get_running_loop() is self._loop, "read it on the loop of the requests, and after the first one"
        silent_since = time.monotonic()
        while time.monotonic() - silent_since < timeout:
            while source:
                silent_since = time.monotonic()
                yield source.popleft()
            await asyncio.sleep(_POLL_S)

    def shutdown(self) -> None:
        self.executor.shutdown()
