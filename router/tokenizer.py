"""Text to token ids and back, and chat messages to a prompt, as the model's own files say.

Follows what transformers does with the same files (`AutoTokenizer`, `apply_chat_template`) without importing it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2 import meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from python_backends.core.errors import ConfigError, InvalidRequest

# What code of a template can raise besides jinja2's own errors, given messages that it did not expect.
_TEMPLATE_FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


class Tokenizer:
    """The tokenizer and chat template of one model directory. Thread-safe: nothing changes after __init__.

    Reads tokenizer.json, tokenizer_config.json (chat_template and the special tokens that templates name) and
    chat_template.jinja, which wins. Raises ConfigError that names the file and the fix.
    """

    def __init__(self, model_dir: Path) -> None:
        self._tokenizer = _load_tokenizer(model_dir / "tokenizer.json")
        config = _load_config(model_dir / "tokenizer_config.json")
        self._template, self.template_knows_tools = _load_template(model_dir, config)
        self._template_tokens = _special_tokens(config)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._anchor = self._tokenizer.encode("a", add_special_tokens=False).ids
        self._anchor_text = self.decode(self._anchor)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included. The model's logits may be padded beyond it."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the special tokens that the model's post-processor adds."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Token ids of `render_chat`; the template alone says which special tokens there are, BOS included."""
        return self._encode(self.render_chat(messages, tools), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The prompt text for the assistant's next message. `tools` only for a template that knows them.

        Raises InvalidRequest that names the message and field, or says what the template objected to.
        """
        if self._template is None:
            raise InvalidRequest("messages: this model has no chat template; send the whole prompt as text_input")
        _check_messages(messages)
        try:
            return self._template.render(
                messages=messages, tools=tools or None, documents=None, add_generation_prompt=True, **self._template_tokens
            )
        except _TEMPLATE_FAILURES as error:
            raise InvalidRequest(f"messages: the model's chat template refuses them: {error}") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids. Special tokens and ids outside the vocabulary have none; broken UTF-8 gives U+FFFD."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def is_silent(self, token_id: int) -> bool:
        """Whether decode leaves the token out wherever it stands: special tokens, ids outside the vocabulary."""
        return token_id in self._special_ids or self._tokenizer.id_to_token(token_id) is None

    def token_text(self, token_id: int) -> str:
        """Text of one token as it reads after others: its leading space stays, special tokens are shown."""
        text = self._tokenizer.decode([*self._anchor, token_id], skip_special_tokens=False)
        if text.startswith(self._anchor_text):
            return text[len(self._anchor_text) :]
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the prompt is not valid Unicode: lone surrogate at character {error.start}") from error
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def _load_tokenizer(path: Path) -> tokenizers.Tokenizer:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} is missing; give a model directory with tokenizer.json (transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one)"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}; check the file and its permissions") from error
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the class itself is all that tokenizers raises
        raise ConfigError(f"{path}: not a tokenizer: {error}; fetch the model's files again") from error
    # Both can be left in the file by training; a prompt must be neither cut nor filled.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _load_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, or nothing when the model has none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: can't be read as JSON: {error}; fetch the model's files again") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: not a JSON object; fetch the model's files again")
    return config


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like: a string, or an object with the string as `content`."""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _load_template(model_dir: Path, config: Mapping[str, Any]) -> tuple[jinja2.Template | None, bool]:
    """The chat template, if there is one, and whether it presents tools to the model."""
    path = model_dir / "chat_template.jinja"
    try:
        source: str | None = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        path = model_dir / "tokenizer_config.json"
        source = _template_source(config.get("chat_template"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}; check the file and its permissions") from error
    if source is None:
        return None, False
    try:
        return _environment().from_string(source), "tools" in meta.find_undeclared_variables(_environment().parse(source))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{path}: chat template, line {error.lineno}: {error.message}; correct the template") from error


def _template_source(value: object, path: Path) -> str | None:
    """A string, or of a list of {name, template} the one named `default`."""
    if value is None or isinstance(value, str):
        return value
    try:
        named = {entry["name"]: str(entry["template"]) for entry in value}  # type: ignore[attr-defined]
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{path}: chat_template must be a string or a list of objects with name and template") from error
    if "default" not in named:
        raise ConfigError(f"{path}: chat_template has no template named 'default' (it has {', '.join(map(str, named))})")
    return named["default"]


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it; sandboxed, because a template is somebody else's code."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}` marks assistant text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    """Without the HTML escapes of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidRequest("messages must be a non-empty list of objects with role and content")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidRequest(f"messages[{index}] must be an object with role and content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise InvalidRequest(f"messages[{index}].{key} must be a string")
