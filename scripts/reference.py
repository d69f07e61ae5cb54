"""Writes docs/configuration.md, docs/api.md and docs/observability.md from the code; a test holds them equal."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import msgspec
from msgspec import Meta

from python_backends.core.config import Deployment, WorkerConfig
from python_backends.core.paths import repository_root
from python_backends.core.section import Section
from python_backends.core.tensors import ROUTER_INPUTS, ROUTER_OUTPUTS, TensorSpec
from python_backends.core.types import SamplingParams
from router.metrics import FAMILIES, Family, Kind

_CONFIGURATION = """# Configuration

One YAML file describes a deployment (`configs/`); `scripts/serve --config FILE` starts it. An unknown key, a wrong type
or a value out of bounds is an error at start that names the key. This page is written by `python -m scripts.reference`.

Environment: `BATON_CONFIG` (deployment file of a plain `tritonserver`; default `configs/default.yaml`), `BATON_RUN_DIR`
(directory for the key and the channel's socket), `BATON_TRITON` (host:port of the server's HTTP service, by which the router
restarts workers; without it streams stand still meanwhile), `BATON_CACHE` (converted weights; default `~/.cache/baton`),
`BATON_PYTHON` (a Python that has what Baton needs: the scripts run in it and make no .venv).

| key | type | default | meaning |
|---|---|---|---|
"""
_API = """# API

## OpenAI

The front end (port 9000 by default) serves `/v1/chat/completions`, `/v1/completions` and `/v1/models` as OpenAI describes
them, with streaming, `n`, `stop`, `seed`, `logprobs`, `logit_bias`, penalties, `stream_options`, `response_format`
(json_object, json_schema) and `tools`. The form of an answer and the arguments of tool calls are enforced token by token on
the workers, also across a handoff or the death of a worker; a model whose chat template knows no tools is told of them in
the system message. Further fields: `top_k`,
`min_p`, `repetition_penalty`, `min_tokens`, `stop_token_ids`, `ignore_eos`, `priority`, and `baton`: an object with `route`
(auto, remote, local, aggregated), `proof` (true returns the proof as `baton.proof`), `cache_salt`, `timeout_s`, and the
targets `slo_ttft_ms` and `slo_itl_ms`. A field it does not know is an error that names it. Errors have OpenAI's form; 429
(queue full) and 503 carry `Retry-After`, as predicted, 504 means that the deadline passed. What the engine trtllm can't do
is refused by name: [tensorrt-llm.md](tensorrt-llm.md).
`/health` says whether requests can be served now, `/metrics` passes Triton's metrics on. Keys,
tenants, origins and limits: `http.*` in [configuration.md](configuration.md). The headers `traceparent` and `x-request-id`
are taken and returned; the page at `/` and the endpoints under `/baton` are told of in [observability.md](observability.md).

## Triton

The model `router` is the one to call: gRPC or HTTP (`/v2/models/router/generate`, `/generate_stream`). Inputs and numbers
travel as [1, n], texts that come back as [1]; in JSON bodies they are plain values. Give one of `text_input`, `messages`,
`input_ids`. This page is written by `python -m scripts.reference`.

Clients of TensorRT-LLM's models `ensemble` and `tensorrt_llm_bls` have the model's name to change, and no more: NVIDIA's
`end_to_end_grpc_client.py` was run like that, whole and streamed, with several prompts, stop words and log-probabilities.
Refused by name: beams, several prompts in one request, bad words, logits, LoRA, and `--return-perf-metrics` of that client,
since it asks for counts of blocks and drafts too (the four times alone are there, and the proof counts in tokens).

Errors: INVALID_ARG (400) names the field; UNAVAILABLE (503) may be sent again: the queue is full, a worker is lost or
the deadline passed; CANCELLED; INTERNAL. The request parameter `timeout` (microseconds) is the deadline. In a gRPC stream
Triton gives an error's message alone; with the request parameter `error_codes: true` it begins with the code
(`UNAVAILABLE: ...`). Triton's own way to codes, the metadata `triton_grpc_error: true`, is not for production before Triton
26.04: errors that come while a request waits crash the server now and then (a use after free in its gRPC front end, seen
with 24.10).

The request parameters `traceparent` and `tracestate` continue a client's trace ([observability.md](observability.md)).

A client that cancels or goes away frees everything its request held within a second. Triton tells of it for gRPC and
`/generate_stream`; a request by `/generate` runs to its end or deadline.

"""

_OBSERVABILITY = """# Observability

What a deployment says about itself: a page to look at, traces of single requests, metrics of all of them. This page is
written by `python -m scripts.reference`.

## The page

The front end serves it at `/` (port 9000 by default): chat and comparison, pools, requests, prefix cache. It loads nothing
from other hosts. Where `http.api_keys_file` is set it asks for a key and keeps it in the browser's tab only.

- **Chat** streams an answer and tells its route, TTFT and where its KV came from. Stop cancels it at the server. **Compare**
  sends one prompt through prefill and decode workers and then through an aggregated one, while a long prompt arrives, and
  shows TTFT and ITL side by side.
- **Pools** shows each worker: batch, queue, KV held and cached, and for how long it has been down.
- **Requests** is a waterfall of the last 2,000 and of those in flight. Click one, or move with the arrow keys, for its
  times, route and why, workers, and attempts that failed. The filter looks into ids, workers, routes, reasons and errors.
- **Prefix cache** shows how much of the prompts was found in caches, and which prompts begin alike.

It stays open through deaths: it says which worker, or that the router or the front end, is gone, and goes on by itself.
Behind it is `GET /baton/events` (server-sent events); while nobody watches, nothing is asked of the router.

## One slow request

`scripts/trace ID` prints where its time went, from the router's memory of the last 2,000 requests: no collector is needed.
Any id will do: `request_id` or `trace_id` of the proof, the `x-request-id` or `traceparent` of the answer's head, the
completion's id, Triton's request id, or the beginning of one. `scripts/trace slowest`, `scripts/trace latest`, `--json`.
Over HTTP: `GET /baton/requests/ID`.

```
{trace}
```

queue + prefill is the time to the first token; handoff + first decode is from there to the second one. `queue` is all of
TTFT that is not computing: waiting for a worker, hops, tokenising where no front end did it.

## Traces

With `tracing.otlp_endpoint` each request becomes one OpenTelemetry trace, sent by OTLP over HTTP (protobuf):
`generate` (front end and router), `front end` with `tokenize`, `router` with `queue`, `prefill`, `handoff` with `transfer`,
and `decode` with `first decode`. Attributes follow the conventions for generative AI (`gen_ai.usage.*`); Baton's own begin
with `baton.`. Failed attempts are events of `router`.

A client's trace goes on: the header `traceparent` (and `tracestate`) at the front end; for Triton the request parameter
`traceparent`, the header of gRPC and `/infer` requests where the server forwards it (`scripts/serve` sees to that), or the
server's own trace (`tritonserver --trace-config=mode=opentelemetry ...`), whose span is then the parent. Answers of the
front end carry `traceparent`, every proof `trace_id`. If a traceparent says "not sampled" nothing is exported; without one,
`tracing.sample` decides.

The spans are made in the router's process, since every request passes there, from the record that it keeps anyway: workers
and front ends run no SDK. A thread of its own exports them from a bounded queue; a slow or dead collector costs traces
(`baton_traces_dropped_total`) and nothing else.

## Metrics

On Triton's metrics port (8002), passed on by the front end at `/metrics`. Histograms are counters with a label `le`, for
`histogram_quantile`: Triton's Python backend got histograms late, and a counter needs far fewer calls. What changed is
handed on a few times a second, histograms once a second.

- `configs/grafana/baton.json`: a dashboard; import it and choose the Prometheus data source.
- `configs/prometheus/baton.rules.yaml`: alert rules; each says what to do.

| metric | type | labels | meaning |
|---|---|---|---|
"""
_TRACE_EXAMPLE = """\
$ scripts/trace chatcmpl-e2f513a8
e53fa800a07ec86e.1  ok  51 prompt tokens, 20 produced, 352 ms
trace  0af7651916cd43dd8448eb211c80319c
why    first token in 71 ms on prefill (0 of 51 tokens cached, 0 ahead), then 21.4 ms per token on decode; local 96 ms
request            ████████████████████████████████████     363 ms
  front end        █                                       11.0 ms
    tokenize        ▏                                       0.6 ms
  router            ███████████████████████████████████     352 ms
    queue           ▌                                       4.6 ms
    prefill         ▌███▊                                  38.5 ms  prefill
    handoff             ▎█                                 10.6 ms  decode
      transfer           ▏                                  2.0 ms  shm
    decode               ▌█████████████████████████████     298 ms  decode
      first decode       ▌█▋                               19.3 ms"""


def render_configuration() -> str:
    return _CONFIGURATION + "".join(f"{row}\n" for row in _rows(Deployment, ""))


def render_api() -> str:
    names = ", ".join(f"`{name}`" for name in SamplingParams.__struct_fields__)
    return (
        f"{_API}### Inputs\n\n{_tensor_table(ROUTER_INPUTS)}\n"
        f"Keys of `sampling_parameters`: {names}; `stop_words`, `min_length` and `random_seed` are aliases.\n\n"
        f"### Outputs\n\n{_tensor_table(ROUTER_OUTPUTS)}"
    )


def render_observability() -> str:
    return _OBSERVABILITY.replace("{trace}", _TRACE_EXAMPLE) + "".join(f"{_metric_row(family)}\n" for family in FAMILIES)


def _metric_row(family: Family) -> str:
    labels = ", ".join(f"`{label}`" for label in (*family.labels, *(["le"] if family.kind is Kind.HISTOGRAM else [])))
    return f"| `{family.name}` | {family.kind.value} | {labels} | {family.meaning} |"


def _rows(section: type[Section], prefix: str) -> Iterator[str]:
    hints = get_type_hints(section, include_extras=True)
    alike = Counter(_section_of(hint) for hint in hints.values())
    done: set[type[Section]] = set()
    for field in msgspec.structs.fields(section):
        hint = hints[field.name]
        inner = _section_of(hint)
        if inner in done:
            continue
        if inner is not None:
            done.add(inner)
            names = [name for name, other in hints.items() if _section_of(other) is inner]
            name = field.name if alike[inner] == 1 else f"{{{','.join(names)}}}"
            yield from _rows(inner, f"{prefix}{name}{'[]' if inner is WorkerConfig else ''}.")
        else:
            yield f"| `{prefix}{field.name}` | {_type_name(hint)} | {_default(field)} | {_meaning(hint)} |"


def _section_of(hint: Any) -> type[Section] | None:
    if isinstance(hint, type) and issubclass(hint, Section):
        return hint
    return next((inner for argument in get_args(hint) if (inner := _section_of(argument)) is not None), None)


def _type_name(hint: Any) -> str:
    bare = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    values = [value for value in get_args(bare) if isinstance(value, str)]
    if type(None) in get_args(bare):
        return " or ".join("null" if inner is type(None) else _type_name(inner) for inner in get_args(bare))
    return ", ".join(values) if values else getattr(bare, "__name__", str(bare))


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    return f"`{msgspec.json.encode(default).decode()}`"


def _meaning(hint: Any) -> str:
    return next((m.description for m in getattr(hint, "__metadata__", ()) if isinstance(m, Meta) and m.description), "")


def _tensor_table(specs: tuple[TensorSpec, ...]) -> str:
    rows = (f"| `{t.name}` | {t.dtype} | {t.dims[0] if t.dims[0] > 0 else 'n'} | {t.meaning} |\n" for t in specs)
    return "| tensor | type | elements | meaning |\n|---|---|---|---|\n" + "".join(rows)


def main() -> int:
    argparse.ArgumentParser(prog="python -m scripts.reference", description=__doc__).parse_args()
    docs = repository_root() / "docs"
    docs.mkdir(exist_ok=True)
    (docs / "configuration.md").write_text(render_configuration())
    (docs / "api.md").write_text(render_api())
    (docs / "observability.md").write_text(render_observability())
    return 0


if __name__ == "__main__":
    sys.exit(main())
