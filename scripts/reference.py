"""Writes docs/configuration.md and docs/api.md from the code that they describe; a test holds them equal."""

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

_CONFIGURATION = """# Configuration

One YAML file describes a deployment (`configs/`); `scripts/serve --config FILE` starts it. An unknown key, a wrong type
or a value out of bounds is an error at start that names the key. This page is written by `python -m scripts.reference`.

Environment: `BATON_CONFIG` (deployment file of a plain `tritonserver`; default `configs/default.yaml`), `BATON_RUN_DIR`
(directory for the key and the channel's socket), `BATON_CACHE` (converted weights; default `~/.cache/baton`), `BATON_PYTHON`
(a Python that has what Baton needs: the scripts run in it and make no .venv).

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
(auto, remote, local, aggregated), `proof` (true returns the proof as `baton.proof`), `cache_salt` and `timeout_s`. A field it
does not know is an error that names it. Errors have OpenAI's form; 429 (queue full) and 503 carry `Retry-After`, 504 means
that the deadline passed. What the engine trtllm can't do is refused by name: [tensorrt-llm.md](tensorrt-llm.md).
`/health` says whether requests can be served now, `/metrics` passes Triton's metrics on. Keys,
tenants, origins and limits: `http.*` in [configuration.md](configuration.md).

## Triton

The model `router` is the one to call: gRPC or HTTP (`/v2/models/router/generate`, `/generate_stream`). Tensors travel as
[1, n]; in JSON bodies they are plain values. Give one of `text_input`, `messages`, `input_ids`. This page is written by
`python -m scripts.reference`.

Errors: INVALID_ARG (400) names the field; UNAVAILABLE (503) may be sent again: the queue is full, a worker is lost or
the deadline passed; CANCELLED; INTERNAL. The request parameter `timeout` (microseconds) is the deadline.

A client that cancels or goes away frees everything its request held within a second. Triton tells of it for gRPC and
`/generate_stream`; a request by `/generate` runs to its end or deadline.

"""


def render_configuration() -> str:
    return _CONFIGURATION + "".join(f"{row}\n" for row in _rows(Deployment, ""))


def render_api() -> str:
    names = ", ".join(f"`{name}`" for name in SamplingParams.__struct_fields__)
    return (
        f"{_API}### Inputs\n\n{_tensor_table(ROUTER_INPUTS)}\n"
        f"Keys of `sampling_parameters`: {names}; `stop_words`, `min_length` and `random_seed` are aliases.\n\n"
        f"### Outputs\n\n{_tensor_table(ROUTER_OUTPUTS)}"
    )


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
    return 0


if __name__ == "__main__":
    sys.exit(main())
