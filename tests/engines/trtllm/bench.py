"""TensorRT-LLM engines over the fake, one knobs file each, so that a test can break one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from python_backends.core.config import Deployment, EngineConfig, ModelConfig, TransferConfig, WorkerConfig
from python_backends.core.errors import ConfigError
from python_backends.core.messages import PrefillDone
from python_backends.core.types import Epoch, GenerateRequest, LeaseEnd, Role
from python_backends.engines.base import create_engine
from tests.engines.bench import KEY, EngineBench, make_request
from tests.engines.trtllm.playing import RELEASES, Knobs, playing, trtllm_config

BLOCK = 16
MAX_CONTEXT = 2048


class TrtllmBench(EngineBench):
    """`knobs` rules its LLM alone."""

    def __init__(self, deployment: Deployment, knobs: Knobs, epoch: int) -> None:
        self.knobs = knobs
        engine = create_engine(deployment, deployment.workers[0], Epoch(epoch), KEY)
        try:
            with knobs.apply():
                super().__init__(engine)
        except ConfigError:
            engine.close()
            raise

    def handed(self, done: PrefillDone, request_id: str, prompt: list[int], **fields: Any) -> GenerateRequest:
        return make_request(request_id, prompt, [done.token_id], **fields)

    def result_of(self, request_id: str) -> PrefillDone:
        """Of a prefill that was begun before."""
        self.wait(lambda: self.last(request_id) is not None)
        done = self.last(request_id)
        assert isinstance(done, PrefillDone), done
        return done

    def fetched(self, lease_id: str | None) -> None:
        """What the router says once the decode worker has the KV."""
        self.engine.release(lease_id or "", LeaseEnd.FETCHED)


class Trtllm:
    """Makes engines of one release: make(Role.DECODE, lease_s=..., knobs={...}, any field of TrtllmConfig)."""

    def __init__(self, release: str, model: Path, directory: Path) -> None:
        self.release = release
        self._model = model
        self._directory = directory
        self._benches: list[TrtllmBench] = []

    def make(
        self,
        role: Role,
        *,
        lease_s: float = 10.0,
        timeout_s: float = 0.2,
        pool_tokens: int = 8192,
        max_batch: int = 64,
        max_queue: int = 1024,
        model: Path | None = None,
        knobs: Mapping[str, object] | None = None,
        **trtllm: Any,
    ) -> TrtllmBench:
        number = len(self._benches)
        ruled = Knobs(self._directory / f"{role.value}-{number}.json", RELEASES[self.release])
        ruled.set(**{"step_ms": 0.2, **(knobs or {})})
        trtllm.setdefault("first_output_s", min(5.0, lease_s))
        deployment = Deployment(
            model=ModelConfig(path=str(model or self._model), max_context=min(MAX_CONTEXT, pool_tokens)),
            workers=(WorkerConfig(role, role.value, "trtllm", gpus="0"),),
            engine=EngineConfig(
                block_size=BLOCK, max_batch=max_batch, max_queue=max_queue, trtllm=trtllm_config(pool_tokens, **trtllm)
            ),
            transfer=TransferConfig(lease_s=lease_s, timeout_s=timeout_s),
        )
        bench = TrtllmBench(deployment, ruled, number + 1)
        self._benches.append(bench)
        return bench

    def close(self) -> None:
        for bench in self._benches:
            bench.knobs.set()  # what is wedged goes on, so that it can be closed
            bench.engine.close()


@contextmanager
def trtllm(release: str, model: Path, directory: Path) -> Iterator[Trtllm]:
    with playing(RELEASES[release], directory):
        engines = Trtllm(release, model, directory)
        try:
            yield engines
        finally:
            engines.close()
