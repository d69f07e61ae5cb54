"""What a running TensorRT-LLM deployment must do, asked of it from outside as clients ask: for scripts/verify-gpu."""

from __future__ import annotations

import random
import re
import signal
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import psutil

from python_backends.core.errors import BatonError, InvalidRequest
from python_backends.core.trtllm import kv_timeout_ms
from python_backends.core.types import Role
from scripts.client import Chunk, Client
from scripts.tritonserver import TritonServer

_WORDS = ("the", "river", "city", "king", "of", "and", "old", "green", "runs", "between", "mountains", "because", "seven")
_SAME_TOKENS = 32  # compared of each answer
_AT_ONCE = 32
_BURST, _BURSTS = 100, 3
_SETTLE_S = 3.0  # beyond the time after which TensorRT-LLM drops KV
_WARM_UP_S = 180.0
_IN_FLIGHT_TOKENS = 200
_LOAD_CLIENTS = 16
_TRIES_PER_PAIR = 12  # the router chooses the pair; so often it is asked until it has chosen all of them


@dataclass(frozen=True, slots=True)
class Result:
    """ok None: nothing to hold, only told."""

    name: str
    ok: bool | None
    detail: str
    seconds: float = 0.0


class Failed(Exception):
    """A check did not hold; the message says what was seen."""


class Verification:
    """Checks against one running server, in the order of `checks`. Each returns what it saw or raises Failed."""

    def __init__(self, server: TritonServer, client: Client, load_s: float) -> None:
        """`load_s`: how long the load test runs."""
        self._server = server
        self._load_s = load_s
        self._client = client
        self._deployment = server.deployment
        self._rng = random.Random(0)

    def checks(self) -> list[tuple[str, Callable[[], str]]]:
        """What can be asked of this deployment: without prefill workers nothing is handed over."""
        checks: list[tuple[str, Callable[[], str]]] = [("refused by name", self.refused_by_name)]
        if self._names(Role.PREFILL):
            checks = [
                ("first handoffs", self.first_handoffs),
                ("first token", self.first_token),
                ("same tokens as alone", self.same_tokens),
                ("prefix cache", self.prefix_cache),
                ("log-probabilities", self.log_probabilities),
                *checks,
                (f"{_AT_ONCE} at once", self.many_at_once),
                ("load", self.load),
                ("cancelled bursts", self.cancelled_bursts),
                ("prefill worker killed", lambda: self.killed(Role.PREFILL)),
                ("decode worker killed", lambda: self.killed(Role.DECODE)),
            ]
        return [*checks, ("nothing held", self.nothing_held)]

    # --- the checks ---

    def first_handoffs(self) -> str:
        pairs = len(self._names(Role.PREFILL)) * len(self._names(Role.DECODE))
        warmed = self._wait(lambda: self._metric("baton_warm_ups_total", verdict="unchecked") >= pairs, _WARM_UP_S)
        _require(warmed, f"of {pairs} pairs of workers not all could hand over: see the log")
        return f"{pairs} pairs"

    def first_token(self) -> str:
        answer = self._ask(self._prompt(100), route="remote", max_tokens=16)
        proof = answer.proof
        _require(proof["kv_tokens_received"] > 0, f"no KV was received: {proof['why']}")
        _require(proof["kv_tokens_recomputed"] == 0, f"recomputed: {proof['digest']}")
        return f"TTFT {proof['ttft_ms']:.0f} ms, handoff {proof['handoff_ms']:.0f} ms, by {proof['transport']}"

    def same_tokens(self) -> str:
        """Greedy, by every pair of workers and in one worker alone. Rounding in another batch may part them late."""
        alone = "aggregated" if self._names(Role.AGGREGATED) else "local"
        pairs = {(prefill, decode) for prefill in self._names(Role.PREFILL) for decode in self._names(Role.DECODE)}
        lengths = [20, 200, min(2000, self._deployment.model.max_context // 8)]
        waiting, parted = set(pairs), []
        for turn in range(_TRIES_PER_PAIR * len(pairs)):
            if turn >= len(lengths) and not waiting:
                break
            words = lengths[turn % len(lengths)]
            prompt = self._prompt(words)
            handed = self._ask(prompt, route="remote", max_tokens=_SAME_TOKENS, return_output_ids=True)
            expected = self._ask(prompt, route=alone, max_tokens=_SAME_TOKENS, return_output_ids=True)
            pair = handed.proof["prefill_worker"], handed.proof["decode_worker"]
            waiting.discard(pair)
            if handed.token_ids != expected.token_ids:
                same = common(handed.token_ids, expected.token_ids)
                parted.append(f"{' -> '.join(pair)}, {words} words: other tokens after {same} of {len(expected.token_ids)}")
        _require(not parted, "; ".join(parted))
        _require(not waiting, f"the router never chose {', '.join(' -> '.join(pair) for pair in sorted(waiting))}")
        return f"{len(pairs)} pairs, prompts of {', '.join(map(str, lengths))} words, {_SAME_TOKENS} tokens each as {alone}"

    def prefix_cache(self) -> str:
        workers = len(self._deployment.workers)
        told = self._wait(lambda: self._metric("baton_prefix_events") == workers, 10)
        _require(told, "a worker tells no events of its prefix cache: the router routes to it blindly")
        prompt = self._prompt(300)
        self._ask(prompt, route="remote", max_tokens=2)
        time.sleep(1.0)  # the events are on their way
        reused = self._ask(prompt, route="remote", max_tokens=2).proof["prefill_tokens_reused"]
        _require(reused > 0, "the same prompt again reused nothing")
        return f"{reused} tokens reused"

    def log_probabilities(self) -> str:
        answer = self._ask(self._prompt(50), route="remote", max_tokens=8, return_log_probs=True)
        return f"served, digest {answer.proof['digest']}"

    def refused_by_name(self) -> str:
        try:
            self._ask("x", max_tokens=2, sampling_parameters='{"logit_bias": {"5": 1}}')
        except InvalidRequest as error:
            _require("logit_bias" in str(error), f"the error does not name it: {error}")
            return str(error)
        raise Failed("logit_bias was accepted")

    def many_at_once(self) -> str:
        prompts = [self._prompt(self._rng.randrange(20, 400)) for _ in range(_AT_ONCE)]
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            answers = list(threads.map(lambda prompt: self._ask(prompt, route="remote", max_tokens=64), prompts))
        recomputed = [answer.proof["digest"] for answer in answers if answer.proof["kv_tokens_recomputed"]]
        _require(not recomputed, f"{len(recomputed)} of {_AT_ONCE} were recomputed: {', '.join(set(recomputed))}")
        ttft = sorted(answer.proof["ttft_ms"] for answer in answers)
        return f"TTFT median {ttft[len(ttft) // 2]:.0f} ms, longest {ttft[-1]:.0f} ms, none recomputed"

    def load(self) -> str:
        """Clients that ask again as soon as they are answered; the router decides the ways."""
        end = time.monotonic() + self._load_s
        began = time.monotonic()
        with ThreadPoolExecutor(_LOAD_CLIENTS) as threads:
            asked = [threads.submit(self._ask_until, end, random.Random(seed)) for seed in range(_LOAD_CLIENTS)]
            answers = [answer for future in asked for answer in future.result()]
        seconds = time.monotonic() - began
        rate, tokens = len(answers) / seconds, sum(len(answer.token_ids) for answer in answers) / seconds
        ttft = [answer.proof["ttft_ms"] for answer in answers]
        gaps = [gap for answer in answers for gap in answer.gaps_ms]
        recomputed = sum(answer.proof["kv_tokens_recomputed"] > 0 for answer in answers)
        _require(recomputed == 0, f"{recomputed} of {len(answers)} requests were recomputed")
        return (
            f"{len(answers)} requests of {_LOAD_CLIENTS} clients in {seconds:.0f} s, none failed or recomputed: "
            f"{rate:.1f} requests/s, {tokens:.0f} tokens/s; "
            f"TTFT p50 {percentile(ttft, 50):.0f}, p90 {percentile(ttft, 90):.0f}, p99 {percentile(ttft, 99):.0f} ms; "
            f"ITL p50 {percentile(gaps, 50):.1f}, p99 {percentile(gaps, 99):.1f} ms"
        )

    def _ask_until(self, end: float, rng: random.Random) -> list[Answer]:
        answers = []
        while time.monotonic() < end:
            prompt = " ".join(rng.choices(_WORDS, k=rng.randrange(20, 400)))
            answers.append(self._ask(prompt, max_tokens=rng.randrange(16, 128), return_output_ids=True))
        return answers

    def cancelled_bursts(self) -> str:
        """Gone before, during and after the handoff. This is what fills TensorRT-LLM's pool for ever when done badly."""
        for _ in range(_BURSTS):
            with ThreadPoolExecutor(_BURST) as threads:
                list(threads.map(self._ask_and_leave, [self._prompt(self._rng.randrange(50, 400)) for _ in range(_BURST)]))
        detail = self.nothing_held()
        after = self._ask(self._prompt(100), route="remote", max_tokens=8)
        _require(after.proof["kv_tokens_recomputed"] == 0, f"afterwards KV no longer moves: {after.proof['digest']}")
        return f"{_BURST * _BURSTS} requests; {detail}, and KV still moves"

    def killed(self, role: Role) -> str:
        """SIGKILL with requests in flight: none fails, and the worker comes back."""
        name = self._names(role)[0]
        victim = self._process(name)
        with ThreadPoolExecutor(8) as threads:
            asked = [threads.submit(self._ask, self._prompt(200), max_tokens=_IN_FLIGHT_TOKENS) for _ in range(8)]
            time.sleep(0.5)
            victim.send_signal(signal.SIGKILL)
            began = time.monotonic()
            attempts = [future.result().proof["attempts"] for future in asked]
        back = self._wait(lambda: self._is_back(name, victim.pid), self._deployment.engine.trtllm.load_timeout_s)
        _require(back, f"worker {name} did not come back")
        seconds = time.monotonic() - began
        pairs_warm = self._wait(lambda: self._moves_kv(), _WARM_UP_S)
        _require(pairs_warm, "it came back, but KV no longer moves")
        return f"8 requests whole in up to {max(attempts)} attempts; back after {seconds:.0f} s"

    def nothing_held(self) -> str:
        """Within the time after which TensorRT-LLM drops KV that nobody fetched."""
        limit = kv_timeout_ms(self._deployment) / 1000 + _SETTLE_S
        began = time.monotonic()
        empty = self._wait(lambda: not self._held(), limit)
        _require(empty, f"after {limit:.0f} s: {self._held()}")
        return f"all given back after {time.monotonic() - began:.1f} s"

    # --- asking ---

    def _ask(self, prompt: str, **fields: object) -> Answer:
        return Answer(list(self._client.stream(prompt, temperature=0.0, **fields)))  # type: ignore[arg-type]

    def _ask_and_leave(self, prompt: str) -> None:
        """After no, one or a few pieces."""
        stay = self._rng.choice([0.0, 0.02, 0.1, 0.5])
        with self._client.stream(prompt, route="remote", max_tokens=2000) as stream:
            if stay < 0.1:
                time.sleep(stay)
            else:
                for count, _ in enumerate(stream):
                    if count >= stay * 20:
                        break

    def _moves_kv(self) -> bool:
        proof = self._ask(self._prompt(60), route="remote", max_tokens=4).proof
        return bool(proof["route"] == "remote" and proof["kv_tokens_received"] and not proof["kv_tokens_recomputed"])

    def _prompt(self, words: int) -> str:
        return " ".join(self._rng.choices(_WORDS, k=words))

    # --- looking ---

    def _names(self, role: Role) -> list[str]:
        return [worker.name for worker in self._deployment.workers if worker.role is role]

    def _process(self, name: str) -> psutil.Process:
        for process in psutil.Process(self._server.pid).children(recursive=True):
            with suppress(psutil.Error):  # processes come and go while one looks
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and re.search(rf"/{name}/1/model\.py", " ".join(process.cmdline())):
                    return process
        raise Failed(f"worker {name} has no process")

    def _is_back(self, name: str, old: int) -> bool:
        try:
            return self._process(name).pid != old and self._metric("baton_worker_up") == len(self._deployment.workers)
        except Failed:
            return False

    def _metric(self, name: str, **labels: str) -> float:
        """Sum over the other labels."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        values = self._metrics()
        return sum(v for key, v in values.items() if key.partition("{")[0] == name and all(w in key for w in wanted))

    def _held(self) -> str:
        values = self._metrics()
        held = {key: v for key, v in values.items() if v and ('state="held"' in key or key.startswith("baton_leases"))}
        requests = values.get("baton_router_requests", 0)
        return ", ".join(
            [*(f"{key} is {v:.0f}" for key, v in held.items()), *([f"{requests:.0f} requests"] if requests else [])]
        )

    def _metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://{self._server.host}:{self._server.metrics_port}/metrics", timeout=10) as response:
            text = response.read().decode()
        return {match[1]: float(match[2]) for match in re.finditer(r"^(baton\S+) (\S+)$", text, re.MULTILINE)}

    @staticmethod
    def _wait(condition: Callable[[], bool], within_s: float) -> bool:
        end = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.2)
        return True


@dataclass(frozen=True, slots=True)
class Answer:
    chunks: Sequence[Chunk]

    @property
    def proof(self) -> Mapping[str, Any]:
        return self.chunks[-1].proof or {}

    @property
    def token_ids(self) -> list[int]:
        """Of a request with return_output_ids."""
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def gaps_ms(self) -> list[float]:
        """Between two arrivals."""
        times = [chunk.time for chunk in self.chunks]
        return [(after - before) * 1e3 for before, after in pairwise(times)]


def _require(ok: bool, otherwise: str) -> None:
    if not ok:
        raise Failed(otherwise)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def percentile(values: Sequence[float], percent: int) -> float:
    """The nearest rank; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] if ordered else 0.0


def verify(server: TritonServer, client: Client, told: Callable[[Result], None], load_s: float = 30.0) -> list[Result]:
    """Run all checks against a server that is up."""
    return run_checks(Verification(server, client, load_s).checks(), told)


def run_checks(checks: Sequence[tuple[str, Callable[[], str]]], told: Callable[[Result], None]) -> list[Result]:
    """Each by its name, telling each result; one that fails does not keep the next from running."""
    results = []
    for name, check in checks:
        began = time.monotonic()
        try:
            ok, detail = True, check()
        except (Failed, BatonError) as error:
            ok, detail = False, str(error)
        except Exception as error:  # time on a machine with GPUs is dear: the other checks still run
            ok, detail = False, f"{type(error).__name__}: {error}"
        results.append(Result(name, ok, detail, time.monotonic() - began))
        told(results[-1])
    return results
