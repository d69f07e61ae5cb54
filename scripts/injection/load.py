"""Requests whose right answers are known, sent again and again by clients on threads, each answer checked to the letter."""

from __future__ import annotations

import json
import random
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from loadtest.protocols.http import HttpServer
from python_backends.core.errors import BatonError, EngineFailure
from scripts.client import Client
from scripts.tritonserver import TritonServer

_TIMEOUT_S = 60.0
_IDLE_S = 0.02
_WORDS = ("the", "river", "city", "king", "of", "and", "old", "green", "runs", "between", "mountains", "because", "seven")


@dataclass(frozen=True, slots=True)
class Known:
    """A request that has exactly one right answer."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int
    route: str  # asked for by clients that can; the answer does not depend on it


def known_requests(count: int, seed: int = 0) -> list[Known]:
    """Short and long prompts that begin alike or not, half of them greedy, half of them seeded."""
    rng = random.Random(seed)
    beginnings = [" ".join(rng.choices(_WORDS, k=120)) for _ in range(3)]
    found = []
    for number in range(count):
        words = rng.choices(_WORDS, k=rng.choice([5, 30, 90, 200]))
        start = rng.choice([*beginnings, ""])
        prompt = f"{start} {number} {' '.join(words)}"
        route = "aggregated" if number % 4 == 3 else "auto"
        found.append(Known(prompt, rng.randrange(20, 70), 0.0 if number % 2 else 0.9, number, route))
    return found


class Way(Protocol):
    """How one client talks to the server. One request at a time."""

    def stream(self, known: Known) -> Iterator[str]:
        """The answer's text as it comes. Raises BatonError."""

    def close(self) -> None: ...


class TritonWay:
    """The model `router` over gRPC."""

    def __init__(self, server: TritonServer, client_id: str) -> None:
        self._client = Client(f"{server.host}:{server.grpc_port}", client_id)

    def stream(self, known: Known) -> Iterator[str]:
        fields: dict[str, object] = {"max_tokens": known.max_tokens, "temperature": known.temperature, "seed": known.seed}
        stream = self._client.stream(known.prompt, timeout_s=_TIMEOUT_S, route=known.route, **fields)
        with stream:
            for chunk in stream:
                yield chunk.text

    def close(self) -> None:
        self._client.close()


class OpenAIWay:
    """/v1/completions of the front end, which is also there while the router is not."""

    def __init__(self, server: TritonServer, client_id: str) -> None:
        self._server = HttpServer(f"http://{server.host}:{server.openai_port}/v1", _TIMEOUT_S, {"x-request-id": client_id})
        self._model = server.deployment.model_name

    def stream(self, known: Known) -> Iterator[str]:
        body = {
            "model": self._model,
            "prompt": known.prompt,
            "max_tokens": known.max_tokens,
            "temperature": known.temperature,
            "seed": known.seed,
            "stream": True,
        }
        done = False
        for _, event in self._server.post("/completions", body):
            if event == b"[DONE]":
                done = True
                continue
            chunk = json.loads(event)
            if "error" in chunk:
                raise EngineFailure(str(chunk["error"].get("message")))
            yield "".join(choice["text"] for choice in chunk["choices"])
        if not done:
            raise EngineFailure("the answer ended before its last event")

    def close(self) -> None:
        self._server.close()


@dataclass(eq=False, slots=True)
class Sample:
    """One request. Times are monotonic seconds. Filled in by one thread."""

    client: str
    sent: float
    arrivals: array[float] = field(default_factory=lambda: array("d"))
    ended: float = 0.0  # 0: it runs
    error: str = ""
    wrong: bool = False

    def next_after(self, instant: float) -> float | None:
        """When its next token came, or its end; None when neither has."""
        later = next((arrival for arrival in self.arrivals if arrival > instant), None)
        return later if later is not None else self.ended or None

    def overlaps(self, begin: float, end: float) -> bool:
        return self.sent < end and (not self.ended or self.ended > begin)


class Load:
    """Clients on threads; `begin` them, `stop` them. Between `pause` and `resume` none sends anything."""

    def __init__(self, server: TritonServer, clients: int, requests: Sequence[Known]) -> None:
        """Half of the clients speak OpenAI's API, where there is a front end."""
        kinds: list[type[TritonWay | OpenAIWay]] = [TritonWay, OpenAIWay] if server.deployment.has_front_end else [TritonWay]
        self._ways: dict[str, Way] = {}
        for number in range(clients):
            kind = kinds[number % len(kinds)]
            name = f"{kind.__name__}-{number}"
            self._ways[name] = kind(server, name)
        self._requests = requests
        self._right: dict[tuple[str, Known], str] = {}
        self._samples: list[Sample] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._sending = {name: threading.Event() for name in self._ways}
        self._threads = [threading.Thread(target=self._run, args=item, daemon=True) for item in self._ways.items()]

    def learn(self) -> None:
        """Ask for everything once, at the server as it is when nothing is wrong. Raises BatonError."""
        ways = {name.partition("-")[0]: way for name, way in self._ways.items()}
        for known in self._requests:
            texts = {kind: "".join(way.stream(known)) for kind, way in ways.items()}
            self._right.update({(kind, known): text for kind, text in texts.items()})
            if len(set(texts.values())) > 1:
                raise EngineFailure(f"the same request has different answers before anything was injected: {known}")

    def begin(self) -> None:
        for thread in self._threads:
            thread.start()
        self.resume()

    def pause(self, timeout_s: float = _TIMEOUT_S) -> bool:
        """Returns whether all that ran has ended in time."""
        with self._lock:
            for sending in self._sending.values():
                sending.clear()
        end = time.monotonic() + timeout_s
        while self.live() and time.monotonic() < end:
            time.sleep(_IDLE_S)
        return not self.live()

    def resume(self, only: type[TritonWay | OpenAIWay] | None = None) -> None:
        """`only`: clients of this kind alone."""
        for name, sending in self._sending.items():
            if only is None or name.startswith(only.__name__):
                sending.set()

    def stop(self) -> None:
        self.pause()
        self._stop.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(timeout=5)
        for way in self._ways.values():
            way.close()

    def live(self) -> list[Sample]:
        with self._lock:
            return [sample for sample in self._samples if not sample.ended]

    def between(self, begin: float, end: float) -> list[Sample]:
        """Requests that ran then."""
        with self._lock:
            return [sample for sample in self._samples if sample.overlaps(begin, end)]

    def forget(self) -> None:
        """Requests that have ended are counted no more."""
        with self._lock:
            self._samples = [sample for sample in self._samples if not sample.ended]

    def _run(self, name: str, way: Way) -> None:
        rng = random.Random(name)
        while not self._stop.is_set():
            if self._sending[name].wait(_IDLE_S):
                sample = self._enter(name)
                if sample is not None:
                    self._ask(sample, way, rng.choice(self._requests))

    def _enter(self, name: str) -> Sample | None:
        """A request that counts; None when there has been a pause meanwhile."""
        with self._lock:
            if not self._sending[name].is_set():
                return None
            sample = Sample(name, time.monotonic())
            self._samples.append(sample)
            return sample

    def _ask(self, sample: Sample, way: Way, known: Known) -> None:
        texts = []
        try:
            for text in way.stream(known):
                sample.arrivals.append(time.monotonic())
                texts.append(text)
            sample.wrong = "".join(texts) != self._right[sample.client.partition("-")[0], known]
        except BatonError as error:
            sample.error = f"{type(error).__name__}: {error}"
        finally:
            sample.ended = time.monotonic()
