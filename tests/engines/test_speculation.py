"""Guessing ahead changes how many steps a text takes, never the text."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from python_backends.core.config import Deployment, EngineConfig, FakeConfig, ModelConfig, WorkerConfig
from python_backends.core.messages import TokenChunk
from python_backends.core.types import Epoch, Role
from python_backends.engines.base import create_engine
from python_backends.engines.paged import speculation
from tests.engines.bench import KEY, EngineBench, make_request
from tests.engines.tiny_model import VOCAB, write_tiny_llama

Make = Callable[[str, int], EngineBench]
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0},
    {"temperature": 0.3, "logprobs": 2},
)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setattr(speculation, "_FIRST_MARGINAL", 0.01)  # guess even where it would not pay
    monkeypatch.setattr(speculation.StepCost, "learn", lambda *_: None)
    directory = write_tiny_llama(tmp_path / "tiny")
    benches: list[EngineBench] = []

    def make_bench(engine: str, draft_tokens: int) -> EngineBench:
        deployment = Deployment(
            model=ModelConfig(path=str(directory)),
            workers=(WorkerConfig(role=Role.AGGREGATED, name="aggregated", engine=engine, threads=1),),
            engine=EngineConfig(kv_pool_mib=8, draft_tokens=draft_tokens, fake=FakeConfig(0, 0)),
        )
        benches.append(EngineBench(create_engine(deployment, deployment.workers[0], Epoch(len(benches) + 1), KEY)))
        return benches[-1]

    yield make_bench
    for bench in benches:
        bench.engine.close()


def _prompts() -> list[list[int]]:
    rng = random.Random(5)
    loops = [[*rng.choices(range(3, VOCAB), k=period)] * 6 for period in (1, 2, 5, 11)]
    return [*loops, rng.choices(range(3, VOCAB), k=50)]


@pytest.mark.parametrize("engine", ["torch", "fake"])
def test_the_text_is_the_same_token_for_token(make: Make, engine: str) -> None:
    plain, guessing = make(engine, 0), make(engine, 4)
    chunks = 0
    for number, prompt in enumerate(_prompts()):
        for kind, sampling in enumerate(SAMPLINGS):
            name = f"{number}-{kind}"
            results = []
            for bench in (plain, guessing):
                bench.engine.decode(
                    make_request(name, prompt, max_tokens=60, min_tokens=5, ignore_eos=number % 2 == 0, **sampling), None
                )
            for bench in (plain, guessing):
                tokens, _ = bench.result(name)
                outputs = [output for output in bench.outputs[name] if isinstance(output, TokenChunk)]
                logprobs = [entry.token_id for output in outputs for entry in output.logprobs or []]
                assert logprobs == (tokens if "logprobs" in sampling else [])
                results.append((tokens, outputs[-1].finish_reason))
                chunks += len(outputs) if bench is guessing else -len(outputs)
            assert results[0] == results[1]
    plain.assert_nothing_held()
    guessing.assert_nothing_held()
    if engine == "torch":  # a model that repeats itself; the fake never does
        assert chunks < 0


def test_a_text_never_goes_beyond_its_end(make: Make) -> None:
    bench = make("torch", 4)
    for max_tokens in range(1, 12):
        name = f"r{max_tokens}"
        tokens, report = bench.decode(make_request(name, [7, 8] * 20, max_tokens=max_tokens, ignore_eos=True))
        assert len(tokens) == max_tokens
        assert report.computed_tokens + report.reused_tokens == 39


def test_a_full_pool_still_serves(make: Make) -> None:
    """Room for guesses is taken only from blocks that nobody waits for."""
    bench = make("torch", 4)
    for index in range(40):
        bench.engine.decode(make_request(f"r{index}", [9, 10, 11] * 60, max_tokens=40, ignore_eos=True, seed=index), None)
    for index in range(40):
        assert len(bench.result(f"r{index}")[0]) == 40
    bench.assert_nothing_held()
