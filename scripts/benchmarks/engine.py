"""How fast the CPU engine computes, against what the machine can do, plain PyTorch, transformers and rivals.

    scripts/bench engine --threads 2 --against torch
    scripts/bench engine --threads 2 --against transformers,openvino,onnxruntime,llama.cpp,vllm
    scripts/bench engine --weights int8 --quality

Measures, without scheduler and server: prefill in chunks as the engine does it, and decode steps by batch and context,
greedy draw included. Rivals (scripts/rivals) run in processes of their own and tell their own times. Every repetition runs
all contenders one after the other, in turns from either end, each with a prompt that is not timed before one that is; the
table shows medians. Who has spent --seconds on one line of the table sits out its repetitions after the third. The limits
are measured beside them: reading memory, multiply-adds in registers, and PyTorch's matrix product.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numba
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from python_backends.core.config import ModelConfig, WorkerConfig
from python_backends.core.errors import BatonError, Unavailable
from python_backends.core.paths import repository_root, resolve_model
from python_backends.core.types import Epoch, Role, SamplingParams
from python_backends.engines.paged.runner import Draw, Slice
from python_backends.engines.torch.architecture import Architecture, load_architecture
from python_backends.engines.torch.kernels.executor import CompiledExecutor
from python_backends.engines.torch.kernels.team import cycles
from python_backends.engines.torch.kernels.vector import broadcast, fma, lane_sum
from python_backends.engines.torch.runner import TorchRunner
from python_backends.kv.memory import PoolMemory
from scripts.benchmarks.figures import Figure
from scripts.benchmarks.parts import Bench, Taken
from scripts.rivalry.engine import ENGINES, RivalEngine
from scripts.terminal import print_error

_BLOCK = 16
_READ_BYTES = 512 << 20
_DECODE_STEPS = 12
_WARM_UP_TOKENS = 512
_OURS = "Baton"
_FEWEST_REPETITIONS = 3  # before one that is slow may sit out


# --- limits ---


@numba.njit(nogil=True, fastmath=True)
def _read(numbers: npt.NDArray[np.float32]) -> float:
    total = np.float32(0)
    for i in range(numbers.size):
        total += numbers[i]
    return float(total)


@numba.njit(nogil=True)
def _multiply_add(rounds: int, start: float) -> float:
    """Six sums of sixteen floats: as many as a tile of the kernels keeps in registers."""
    factor, term = broadcast(np.float32(0.999)), broadcast(np.float32(0.001))
    a, b, c = broadcast(np.float32(start)), broadcast(np.float32(start + 1)), broadcast(np.float32(start + 2))
    d, e, f = broadcast(np.float32(start + 3)), broadcast(np.float32(start + 4)), broadcast(np.float32(start + 5))
    for _ in range(rounds):
        a, b, c = fma(a, factor, term), fma(b, factor, term), fma(c, factor, term)
        d, e, f = fma(d, factor, term), fma(e, factor, term), fma(f, factor, term)
    return lane_sum(a + b + c + d + e + f)


@dataclass(frozen=True)
class Limits:
    """GB/s read from memory, GFLOP/s of multiply-adds in registers, GFLOP/s of PyTorch's fp32 matrix product."""

    memory: float
    registers: float
    matrix: float

    def figures(self, part: str) -> Iterator[Figure]:
        for quantity, unit, value in (
            ("memory read", "GB/s", self.memory),
            ("PyTorch's matrix product", "GFLOP/s", self.matrix),
            ("multiply-adds in registers", "GFLOP/s", self.registers),
        ):
            yield Figure(part, quantity, "this machine", unit, (value,))


def measure_limits(threads: int) -> Limits:
    numbers = np.ones(_READ_BYTES // 4, np.float32)
    parts = np.array_split(numbers, threads)
    rounds = 10_000_000
    _read(numbers[:16])
    _multiply_add(1, 1.0)
    read = _best(lambda: _together([partial(_read, part) for part in parts]))
    multiplied = _best(lambda: _together([lambda: _multiply_add(rounds, 1.0)] * threads))
    left, right = torch.randn(1024, 1536), torch.randn(1536, 1536)
    product = _best(lambda: torch.mm(left, right))
    return Limits(
        memory=_READ_BYTES / read / 1e9,
        registers=threads * rounds * 6 * 16 * 2 / multiplied / 1e9,
        matrix=2 * 1024 * 1536 * 1536 / product / 1e9,
    )


def _together(calls: Sequence[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=call) for call in calls[1:]]
    for thread in threads:
        thread.start()
    calls[0]()
    for thread in threads:
        thread.join()


def _best(call: Callable[[], object], times: int = 5) -> float:
    return min(_timed(call) for _ in range(times))


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


# --- contenders ---


class Contender(Protocol):
    name: str

    @property
    def weights(self) -> str:
        """As model.weights."""
        ...

    def prefill(self, tokens: Sequence[int]) -> float:
        """Compute a prompt to its first token; returns the seconds that took."""

    def decode(self, batch: int, context: int) -> list[float]:
        """Seconds of each of _DECODE_STEPS steps of so many sequences."""


class Ours:
    """A TorchRunner, driven as the paged engine drives it."""

    def __init__(
        self, name: str, model: ModelConfig, path: Path, kernels: str, threads: int, chunk: int, pool_mib: int
    ) -> None:
        self.name = name
        self.weights = model.weights
        self.phases: dict[tuple[int, int], list[tuple[float, dict[str, int]]]] = {}  # of decode steps, with their seconds
        self._chunk = chunk
        torch.set_num_threads(threads)
        self.runner = TorchRunner(model, WorkerConfig(role=Role.AGGREGATED), _BLOCK, path, kernels)
        self.runner.start()
        blocks = (pool_mib << 20) // self.runner.layout.block_bytes
        self._memory = PoolMemory(blocks, self.runner.layout.block_bytes, Epoch(1))
        self.runner.attach(self._memory)

    def prefill(self, tokens: Sequence[int]) -> float:
        return _timed(partial(self._prefill, tokens))

    def _prefill(self, tokens: Sequence[int]) -> None:
        table = list(range(-(-len(tokens) // _BLOCK)))
        for start in range(0, len(tokens), self._chunk):
            part = tokens[start : start + self._chunk]
            self.runner.step([Slice(part, start, table, _GREEDY if start + len(part) == len(tokens) else None)])

    def decode(self, batch: int, context: int) -> list[float]:
        """One context is computed and the others are its copies: the time of a step does not depend on what they say."""
        each = -(-(context + _DECODE_STEPS) // _BLOCK)
        tables = [list(range(index * each, (index + 1) * each)) for index in range(batch)]
        for start in range(0, context, 512):
            self.runner.step([Slice(_text(min(512, context - start), 0), start, tables[0], None)])
        for table in tables[1:]:
            self._memory.blocks[table] = self._memory.blocks[tables[0]]
        seconds, executor = [], self.runner._started()
        for step in range(_DECODE_STEPS):
            slices = [Slice([5 + step], context + step, table, _GREEDY) for table in tables]
            seconds.append(_timed(partial(self.runner.step, slices)))
            if isinstance(executor, CompiledExecutor):
                self.phases.setdefault((batch, context), []).append((seconds[-1], executor.phase_cycles()))
        return seconds

    def close(self) -> None:
        self.runner.close()
        self._memory.close()

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """After every token, [tokens, vocab]."""
        table = list(range(-(-len(tokens) // _BLOCK)))
        piece = Slice(tokens, 0, table, _GREEDY, drafts=len(tokens) - 1)
        return self.runner._started().forward([piece]).clone()

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        table = list(range(-(-(len(prompt) + count) // _BLOCK)))
        tokens, start = list(prompt), 0
        while len(tokens) < len(prompt) + count:
            (sampled,) = self.runner.step([Slice(tokens[start:], start, table, _GREEDY)])
            assert sampled is not None
            start = len(tokens)
            tokens.append(sampled.token_id)
        return tokens[len(prompt) :]


class Transformers:
    """The reference implementation, with a cache that grows."""

    name = "transformers"
    weights = "float32"

    def __init__(self, path: Path, threads: int) -> None:
        import transformers

        torch.set_num_threads(threads)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int]) -> float:
        return _timed(lambda: self._model(torch.tensor([list(tokens)]), use_cache=True, logits_to_keep=1))

    @torch.inference_mode()
    def decode(self, batch: int, context: int) -> list[float]:
        cache = self._model(torch.tensor([list(_text(context, 0))]), use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(batch)
        token = torch.full((batch, 1), 5)
        return [
            _timed(lambda: self._model(token, past_key_values=cache, use_cache=True).logits.argmax(-1))
            for _ in range(_DECODE_STEPS)
        ]


class Rival:
    """An engine of scripts/rivals."""

    def __init__(self, engine: RivalEngine) -> None:
        self.name = engine.name
        self.weights = "int8" if engine.name.endswith("q8_0") else "float32"
        self._engine = engine

    def prefill(self, tokens: Sequence[int]) -> float:
        return self._engine.generate([tokens], 0)[0]

    def decode(self, batch: int, context: int) -> list[float]:
        return self._engine.generate([_text(context, index) for index in range(batch)], _DECODE_STEPS)[1]


_GREEDY = Draw(SamplingParams(temperature=0, seed=0), [], [], [])


def _text(count: int, seed: int) -> list[int]:
    return [3 + (index * 7919 + seed * 131) % 300 for index in range(count)]


# --- what is computed ---


def layer_weights(architecture: Architecture) -> int:
    hidden, dim = architecture.hidden_size, architecture.head_dim
    attention = hidden * dim * 2 * (architecture.num_heads + architecture.num_kv_heads)
    return architecture.num_layers * (attention + 3 * hidden * architecture.ffn_size)


def prefill_operations(architecture: Architecture, length: int) -> float:
    """Multiplications and additions of all linear layers, of attention to what each token sees, and of the last logits."""
    seen = length * (length + 1) / 2
    attention = 4 * seen * architecture.num_layers * architecture.num_heads * architecture.head_dim
    return 2 * layer_weights(architecture) * length + attention + 2 * architecture.vocab_size * architecture.hidden_size


# --- measuring ---


@dataclass
class Result:
    """`rounds`: seconds of each repetition: of one prompt, or of each step."""

    contender: str
    what: str
    rounds: list[list[float]] = field(default_factory=list)
    operations: float = 0.0
    bytes: float = 0.0
    tokens: int = 0

    @property
    def seconds(self) -> list[float]:
        return [second for found in self.rounds for second in found]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def figures(self, part: str) -> Iterator[Figure]:
        """A value per repetition: of steps, their median."""
        medians = [statistics.median(found) for found in self.rounds]
        yield Figure(part, self.what, self.contender, "tokens/s", tuple(self.tokens / median for median in medians))
        if not self.operations:
            yield Figure(part, f"ITL: {self.what}", self.contender, "ms", tuple(median * 1e3 for median in medians))


@dataclass(frozen=True)
class Job:
    """One line of the table for each contender: a prompt of `context` tokens (batch 0), or steps of `batch` sequences."""

    batch: int
    context: int

    def __str__(self) -> str:
        return f"decode, batch {self.batch}, context {self.context}" if self.batch else f"prefill {self.context}"


Results = dict[tuple[Job, Contender], Result]
Failed = Callable[[str, BatonError], None]
"""Is told of a contender that can't be measured, by name: goes on without it, or raises."""


def prepared(contenders: Sequence[Contender], architecture: Architecture, args: argparse.Namespace) -> Results:
    """What there is to measure, line by line."""
    jobs = [Job(0, length) for length in args.lengths]
    jobs += [Job(batch, context) for batch in args.batches for context in args.contexts]
    return {(job, contender): _result(job, contender, architecture) for job in jobs for contender in contenders}


def measure(console: Console, results: Results, args: argparse.Namespace, failed: Failed) -> None:
    """Fill them. Who fails is left alone from then on."""
    jobs = list(dict.fromkeys(job for job, _ in results))
    contenders = list(dict.fromkeys(contender for _, contender in results))
    spent = dict.fromkeys(results, 0.0)
    gone = set()
    with Progress(console=console, transient=True, refresh_per_second=1) as progress:
        task = progress.add_task("", total=args.repeat * len(results))
        for repetition in range(args.repeat):
            order = contenders if repetition % 2 == 0 else contenders[::-1]
            for key in ((job, contender) for job in jobs for contender in order):
                progress.update(task, advance=1, description=f"{key[0]}: {key[1].name}")
                if key[1] in gone or (repetition >= _FEWEST_REPETITIONS and spent[key] >= args.seconds):
                    continue
                try:
                    spent[key] += _timed(partial(_measure, results[key], *key, repetition))
                except Unavailable as error:
                    failed(key[1].name, error)
                    gone.add(key[1])


def _measure(result: Result, job: Job, contender: Contender, repetition: int) -> None:
    if job.batch:
        result.rounds.append(contender.decode(job.batch, job.context)[2:])
    else:
        contender.prefill(_text(_WARM_UP_TOKENS, -1))  # its threads and caches: others had the cores before
        result.rounds.append([contender.prefill(_text(job.context, repetition))])


def _result(job: Job, contender: Contender, architecture: Architecture) -> Result:
    if job.batch:
        size = _step_bytes(contender, architecture, job.batch, job.context)
        return Result(contender.name, str(job), bytes=size, tokens=job.batch)
    return Result(contender.name, str(job), operations=prefill_operations(architecture, job.context), tokens=job.context)


def _step_bytes(contender: Contender, architecture: Architecture, batch: int, context: int) -> float:
    """Weights and KV that a step reads."""
    output = architecture.vocab_size * architecture.hidden_size
    bits = {"int8": (8.5, 8.5), "int4": (4.5, 8.5), "bfloat16": (16, 16), "float16": (16, 16)}
    layers_bits, output_bits = bits.get(contender.weights, (32, 32))
    kv = contender.runner.layout.token_bytes if isinstance(contender, Ours) else 0
    return (layer_weights(architecture) * layers_bits + output * output_bits) / 8 + batch * context * kv


def show(console: Console, limits: Limits, results: Sequence[Result]) -> None:
    console.print(
        f"limits: {limits.memory:.1f} GB/s read, {limits.matrix:.0f} GFLOP/s matrix product (PyTorch), "
        f"{limits.registers:.0f} GFLOP/s in registers"
    )
    table = Table("what", "engine", "ms", "p90", "tokens/s", "of the limit")
    for result in results:
        rate = result.operations / result.median / 1e9
        bandwidth = result.bytes / result.median / 1e9
        share = (
            f"{rate:.0f} GFLOP/s, {rate / limits.matrix:.0%}"
            if rate
            else f"{bandwidth:.1f} GB/s, {bandwidth / limits.memory:.0%}"
        )
        table.add_row(
            result.what,
            result.contender,
            f"{result.median * 1e3:.1f}",
            f"{np.percentile(result.seconds, 90) * 1e3:.1f}",
            f"{result.tokens / result.median:.0f}",
            share,
        )
    console.print(table)


def show_phases(console: Console, contenders: Sequence[Contender]) -> None:
    """Where the time of decode steps goes: of each kind of phase, all layers together, and of what is no kernel; medians."""
    began, first = time.perf_counter(), cycles()
    time.sleep(0.1)
    per_ms = (cycles() - first) / (time.perf_counter() - began) / 1e3
    for contender in (contender for contender in contenders if isinstance(contender, Ours) and contender.phases and per_ms):
        table = Table(f"phases of a step, ms: {contender.name}", *(f"batch {b}, context {c}" for b, c in contender.phases))
        measured = [steps[2:] for steps in contender.phases.values()]
        for name in measured[0][0][1]:
            medians = [statistics.median(phases[name] for _, phases in steps) for steps in measured]
            table.add_row(name, *(f"{median / per_ms:.2f}" for median in medians))
        rest = [[seconds * 1e3 - sum(phases.values()) / per_ms for seconds, phases in steps] for steps in measured]
        table.add_row("preparing, embedding, drawing", *(f"{statistics.median(each):.2f}" for each in rest))
        console.print(table)


# --- quality ---


def text_tokens(path: Path) -> list[int]:
    """The project's own documents."""
    from tokenizers import Tokenizer

    root = repository_root()
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    ids: list[int] = Tokenizer.from_file(str(path / "tokenizer.json")).encode("\n".join(page.read_text() for page in pages)).ids
    return ids


def quality(console: Console, engines: Sequence[Ours], path: Path, windows: int) -> None:
    """Perplexity on English text, and how long greedy answers stay those of the first engine."""
    tokens = text_tokens(path)
    pieces = list(_windows(tokens, 512))[:windows]
    table = Table("engine", "perplexity", "change", "same most likely token", "same greedy tokens before the first other")
    first: list[torch.Tensor] = []
    reference, texts = 0.0, []
    for number, engine in enumerate(engines):
        loss, agreed, total, lengths = 0.0, 0, 0, []
        for index, piece in enumerate(pieces):
            logits = engine.logits(piece)
            likely = logits.argmax(-1)
            loss += float(torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(piece[1:]), reduction="sum"))
            total += len(piece) - 1
            answer = engine.greedy(piece[:64], 64)
            if number == 0:
                first.append(likely)
                texts.append(answer)
            agreed += int((likely == first[index])[:-1].sum())
            lengths.append(next((i for i, (a, b) in enumerate(zip(answer, texts[index], strict=True)) if a != b), len(answer)))
        perplexity = math.exp(loss / total)
        reference = reference or perplexity
        table.add_row(
            engine.name,
            f"{perplexity:.3f}",
            f"{perplexity / reference - 1:+.2%}",
            f"{agreed / total:.1%}",
            f"{statistics.mean(lengths):.0f} of 64",
        )
    console.print(table)


def _windows(tokens: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(tokens) - size + 1, size):
        yield list(tokens[start : start + size])


# --- command line ---


_AGAINST = ("torch", "transformers", *ENGINES)


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in _AGAINST]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(_AGAINST)}")
    return names


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="as model.path in a deployment file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a prefill step, as engine.step_tokens")
    parser.add_argument("--lengths", type=_numbers, default=[512, 2048, 4096], help="prompts, tokens")
    parser.add_argument("--batches", type=_numbers, default=[1, 4, 16], help="sequences decoded together")
    parser.add_argument("--contexts", type=_numbers, default=[512], help="tokens each of them has")
    parser.add_argument("--weights", default="auto", help="comma-separated: auto, float32, bfloat16, float16, int8, int4")
    parser.add_argument("--kv-dtype", default="auto", help="comma-separated: auto, float32, float16, int8")
    parser.add_argument("--against", type=_names, default=[], help=f"comma-separated: {', '.join(_AGAINST)}")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15, help="of one contender for one line, beyond three repetitions")
    parser.add_argument("--phases", action="store_true", help="also where the time of a decode step goes")
    parser.add_argument("--kv-pool-mib", type=int, default=1600)
    parser.add_argument("--quality", action="store_true", help="perplexity and agreement instead of speed")
    parser.add_argument("--windows", type=int, default=12, help="with --quality: pieces of 512 tokens")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    console = Console()
    torch.set_num_threads(args.threads)
    try:
        with ExitStack() as stack:
            return _run(args, console, stack)
    except BatonError as error:
        print_error(console, error)
        return 1


def _run(args: argparse.Namespace, console: Console, stack: ExitStack) -> int:
    """`stack` takes what has to be ended."""
    path = resolve_model(args.model)
    contenders = [*_ours(args, path, stack), *_others(args, path, stack, _give_up)]
    if args.quality:
        quality(console, [contender for contender in contenders if isinstance(contender, Ours)], path, args.windows)
        return 0
    limits = measure_limits(args.threads)
    results = prepared(contenders, load_architecture(path), args)
    measure(console, results, args, _give_up)
    show(console, limits, list(results.values()))
    if args.phases:
        show_phases(console, contenders)
    if args.json:
        entries = [{"contender": r.contender, "what": r.what, "seconds": r.seconds} for r in results.values()]
        args.json.write_text(json.dumps({"limits": vars(limits), "results": entries}))
    return 0


def _give_up(name: str, error: BatonError) -> None:
    raise error


def _ours(args: argparse.Namespace, path: Path, stack: ExitStack) -> list[Ours]:
    found = []
    for weights in args.weights.split(","):
        for kv_dtype in args.kv_dtype.split(","):
            model = ModelConfig(path=args.model, weights=weights, kv_dtype=kv_dtype)
            name = _OURS if weights == kv_dtype == "auto" else f"{_OURS}, weights {weights}, KV {kv_dtype}"
            found.append(Ours(name, model, path, "compiled", args.threads, args.chunk, args.kv_pool_mib))
            stack.callback(found[-1].close)
    return found


def _others(args: argparse.Namespace, path: Path, stack: ExitStack, failed: Failed) -> Iterator[Contender]:
    """What --against names."""
    logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for name in args.against:
        try:
            yield _other(name, args, path, logs / f"{name}.log", stack)
        except BatonError as error:
            failed(name, error)


def _other(name: str, args: argparse.Namespace, path: Path, log: Path, stack: ExitStack) -> Contender:
    if name == "torch":
        torches = Ours(name, ModelConfig(path=args.model), path, "torch", args.threads, args.chunk, args.kv_pool_mib)
        stack.callback(torches.close)
        return torches
    if name == "transformers":
        return Transformers(path, args.threads)
    engine = RivalEngine(name, ENGINES[name](path.absolute(), args.threads), log)
    stack.callback(engine.close)
    return Rival(engine)


def measure_engine(bench: Bench, taken: Taken, threads: int, against: Sequence[str]) -> None:
    """As a part among others: the default lengths, batches and contexts, on the demo model."""
    args = _parse(["--threads", str(threads), "--repeat", str(bench.repetitions)])
    args.against = list(against)
    torch.set_num_threads(threads)
    path = resolve_model(args.model)
    with ExitStack() as stack:
        contenders = [*_ours(args, path, stack), *_others(args, path, stack, taken.leave_out)]
        taken.extend(measure_limits(threads).figures(taken.part))
        results = prepared(contenders, load_architecture(path), args)
        try:
            measure(bench.console, results, args, taken.leave_out)
        finally:
            taken.extend(figure for result in results.values() for figure in result.figures(taken.part))


if __name__ == "__main__":
    sys.exit(main())
