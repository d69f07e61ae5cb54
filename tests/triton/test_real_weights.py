"""SmolLM2-135M-Instruct through a real tritonserver: every way gives the same text, and the proof says that KV moved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from python_backends.core.paths import repository_root
from scripts.tritonserver import TritonServer
from tests.triton.asking import Asking, wait_until_nothing_is_held

pytestmark = [pytest.mark.triton, pytest.mark.weights]

CHAT = json.dumps(
    [
        {"role": "system", "content": "You answer questions about geography in one short and correct sentence."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
)
STORY = "Once upon a time there was a miller who had three sons, and when he died he left them nothing but " * 8


@pytest.fixture(scope="module")
def real(real_server: TritonServer) -> Iterator[Asking]:
    client = Asking(real_server)
    yield client
    client.close()


@pytest.mark.parametrize(
    "request_fields",
    [
        {"messages": CHAT, "max_tokens": 24},
        {"text_input": STORY, "max_tokens": 24},
        {"text_input": STORY[40:], "max_tokens": 24, "temperature": 0.8, "top_p": 0.9, "seed": 1234},
    ],
    ids=["chat", "greedy", "seeded"],
)
def test_every_way_gives_the_same_text(real: Asking, request_fields: dict[str, Any]) -> None:
    fields = {**request_fields, "return_output_ids": True, "return_proof": True}
    alone = real.ask(**fields, route="aggregated")
    cold = real.ask(**fields, route="remote")
    proof = json.loads(cold.last("proof"))
    assert proof["kv_tokens_received"] > 0
    assert proof["kv_tokens_recomputed"] == proof["kv_tokens_computed"] == 0
    assert proof["digest"] == "verified"
    assert cold.ids == alone.ids
    warm = real.ask(**fields, route="remote")
    assert json.loads(warm.last("proof"))["kv_tokens_reused"] > 0
    assert warm.ids == alone.ids
    assert real.ask(**fields, route="local").ids == alone.ids


def test_a_factual_question_gets_a_sensible_answer(real: Asking, real_server: TritonServer) -> None:
    answer = real.ask(messages=CHAT, max_tokens=24, stream=True, return_finish_reason=True)
    assert "Paris" in answer.text
    assert answer.last("finish_reason") == b"stop"
    wait_until_nothing_is_held(real_server, within_s=2)


@pytest.mark.timeout(600)  # four workers with real weights start beside whatever else runs
def test_thirty_two_in_flight_on_two_and_two_workers(real: Asking, smollm2_dir: Path, tmp_path: Path) -> None:
    """Half greedy, half seeded, a third with a shared prefix: the same tokens as from one worker alone."""
    wanted: list[dict[str, Any]] = []
    for i in range(32):
        text = f"{STORY[: 120 if i % 3 else 300]} Chapter {i}: the {('eldest', 'second', 'youngest')[i % 3]} son said"
        drawn = {"temperature": 0.8, "top_p": 0.95, "seed": i} if i % 2 else {}
        wanted.append({"text_input": text, "max_tokens": 8, "return_output_ids": True, **drawn})
    names = [f"r{i}" for i in range(32)]
    for name, fields in zip(names, wanted, strict=True):
        real.send(name, **fields, route="aggregated")
    expected = [answer.ids for answer in real.collect(*names)]
    config = tmp_path / "2p2d.yaml"
    example = (repository_root() / "configs" / "2p2d.yaml").read_text()
    example = example.replace("router:\n", "router:\n  mode: always-remote\n").replace("engine:\n", "engine:\n  max_batch: 8\n")
    config.write_text(example)
    with TritonServer(config) as server:
        client = Asking(server)
        for name, fields in zip(names, wanted, strict=True):
            client.send(name, **fields, return_proof=True)
        answers = client.collect(*names)
        client.close()
        proofs = [json.loads(answer.last("proof")) for answer in answers]
        wait_until_nothing_is_held(server, within_s=2)
    assert [answer.ids for answer in answers] == expected
    assert {proof["decode_worker"] for proof in proofs} == {"decode", "decode_1"}, "neither has room for all of them"
    assert {proof["prefill_worker"] for proof in proofs} >= {"prefill", "prefill_1"}
    assert sum(proof["kv_tokens_received"] for proof in proofs) > 32 * 20
    assert sum(proof["kv_tokens_recomputed"] for proof in proofs) == 0
