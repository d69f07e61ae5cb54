"""What a paged engine says when it closes: to everybody who waits, and to nobody else. Turned by hand, as explored."""

from __future__ import annotations

from random import Random

from python_backends.core.config import Deployment, EngineConfig, WorkerConfig
from python_backends.core.messages import Output, PrefillDone, RequestFailed
from python_backends.core.types import Epoch, GenerateRequest, RequestId, Role, SamplingParams
from scripts.exploration.clock import VirtualTime
from scripts.exploration.tiny import HeapMemory, TinyEngine

PREFILL, DECODE = WorkerConfig(Role.PREFILL, "prefill"), WorkerConfig(Role.DECODE, "decode")
DEPLOYMENT = Deployment(workers=(PREFILL, DECODE), engine=EngineConfig(block_size=4))
PROMPT = [5, 6, 7, 8, 9, 10]


class Pair:
    """A prefill and a decode engine, what both have said, and a request whose KV is being copied."""

    def __init__(self) -> None:
        pools: dict[str, HeapMemory] = {}
        self.said: list[Output] = []
        self.prefill, self.decode = (
            TinyEngine(DEPLOYMENT, worker, Epoch(number), b"k" * 32, num_blocks=8, clock=VirtualTime(), pools=pools)
            for number, worker in enumerate((PREFILL, DECODE), start=1)
        )
        for engine in (self.prefill, self.decode):
            engine.start(lambda outputs, change: self.said.extend(outputs))
        sampling = SamplingParams(max_tokens=4, min_tokens=4, seed=1)
        self.prefill.prefill(GenerateRequest(RequestId("r.p"), PROMPT, sampling, 2e9))
        while not self.said:
            self.prefill.turn()
        (done,) = self.said
        assert isinstance(done, PrefillDone)
        self.said.clear()
        self.decode.decode(GenerateRequest(RequestId("r.d"), PROMPT, sampling, 2e9, [done.token_id]), done.ticket)
        self.decode.turn()
        self.decode.transfers.begin(Random(0))


def test_who_waits_for_a_transfer_is_told() -> None:
    pair = Pair()
    pair.decode.close()
    (failed,) = pair.said
    assert isinstance(failed, RequestFailed)
    assert (failed.request_id, failed.retryable) == ("r.d", True)


def test_of_a_request_whose_abort_was_heeded_nothing_is_said() -> None:
    """It stays until its transfer returns, since bytes are still being written for it."""
    pair = Pair()
    pair.decode.abort(RequestId("r.d"))
    pair.decode.turn()
    pair.decode.close()
    assert pair.said == []
