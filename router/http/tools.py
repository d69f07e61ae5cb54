"""Tool calls: how the model is told of tools, held to their schemas, and how its calls are found in its text.

Calls are written as Hermes models write them, <tool_call>{"name": ..., "arguments": {...}}</tool_call>. Chat templates that
know tools present them to the model; for others a system message does. Guided decoding sees to it that every call names a
tool and that its arguments fit the tool's schema.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from python_backends.core.errors import InvalidRequest
from router import grammar
from router.http.errors import ApiError

_BEGIN, _END = "<tool_call>\n", "\n</tool_call>"
_MARK = "<tool_call>"

_INSTRUCTIONS = """You may call functions to help with the user's request. These are the functions, as JSON:
{tools}
To call one, write exactly
<tool_call>
{{"name": FUNCTION, "arguments": ARGUMENTS}}
</tool_call>
with the function's name and its arguments as a JSON object."""


class Function(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: Function


class NamedFunction(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class NamedChoice(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: NamedFunction


Choice = Literal["none", "auto", "required"] | NamedChoice


class Call(msgspec.Struct, frozen=True):
    """One call found in the text; `arguments` is JSON."""

    id: str
    name: str
    arguments: str

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class Toolbox:
    """The tools of one request."""

    def __init__(self, tools: Sequence[ToolSpec], choice: Choice | None, parallel: bool) -> None:
        """Raises ApiError naming the tool or choice that is wrong."""
        self._tools = list(tools)
        names = [tool.function.name for tool in tools]
        if len(set(names)) < len(names):
            raise ApiError(400, "tools: two functions have the same name", param="tools")
        self._choice = choice or "auto"
        if isinstance(self._choice, NamedChoice):
            wanted = self._choice.function.name
            if wanted not in names:
                message = f"tool_choice: there is no function {wanted!r} in tools (there are {', '.join(names) or 'none'})"
                raise ApiError(400, message, param="tool_choice")
            self._tools = [tool for tool in tools if tool.function.name == wanted]
        elif self._choice == "required" and not tools:
            raise ApiError(400, "tool_choice is required, but tools is empty", param="tool_choice")
        self._parallel = parallel

    @property
    def in_use(self) -> bool:
        return bool(self._tools) and self._choice != "none"

    @property
    def for_template(self) -> list[dict[str, Any]]:
        return [msgspec.to_builtins(tool) for tool in self._tools]

    def grammar(self) -> str:
        """Raises ApiError when a tool's parameters are not a JSON schema."""
        tools = [grammar.Tool(tool.function.name, tool.function.parameters or {}) for tool in self._tools]
        try:
            required = self._choice != "auto"
            return grammar.tool_calls(tools, _BEGIN, _END, required=required, parallel=self._parallel)
        except InvalidRequest as error:
            raise ApiError(400, str(error), param="tools") from None

    def instructed(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """For templates that know nothing of tools: what there is to call is said in the system message."""
        text = _INSTRUCTIONS.format(tools="\n".join(json.dumps(tool["function"]) for tool in self.for_template))
        if messages[0]["role"] == "system":
            return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
        return [{"role": "system", "content": text}, *messages]


def spelled_out(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For templates that know nothing of tools: earlier calls and their results as text."""
    return [_spelled_out(message) for message in messages]


def _spelled_out(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [f"{_BEGIN}{json.dumps(call['function'])}{_END}" for call in calls]
    return {"role": message["role"], "content": "\n".join(filter(None, [message["content"], *texts]))}


def with_parsed_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Templates expect the arguments of earlier calls as objects; clients send them as JSON. Raises ApiError."""
    return [_with_parsed_arguments(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _with_parsed_arguments(message: dict[str, Any], where: str) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = []
    for number, call in enumerate(message["tool_calls"]):
        function = call.get("function")
        field = f"{where}.tool_calls[{number}].function"
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(400, f"{field} must be an object with name and arguments", param=field)
        try:
            arguments = json.loads(function.get("arguments") or "{}")
        except (ValueError, TypeError) as error:
            raise ApiError(400, f"{field}.arguments is not JSON: {error}", param=f"{field}.arguments") from None
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": calls}


class CallFinder:
    """Finds the calls in one answer's text as it comes. Text that may be the beginning of a call is held back."""

    def __init__(self) -> None:
        self._text = ""
        self.found = 0

    def push(self, text: str, *, final: bool) -> tuple[str, list[Call]]:
        """(text that is no call, calls that are complete now). With `final` nothing is held back."""
        self._text += text
        calls: list[Call] = []
        shown = ""
        while (start := self._text.find(_MARK)) >= 0:
            end = self._text.find(_END.strip(), start)
            if end < 0:
                break
            shown += self._text[:start]
            call = _read(self._text[start + len(_MARK) : end])
            self._text = self._text[end + len(_END.strip()) :]
            if call is not None:
                calls.append(call)
        self.found += len(calls)
        keep = 0 if final else self._held(start)
        shown += self._text[: len(self._text) - keep]
        self._text = self._text[len(self._text) - keep :]
        return shown.strip() if self.found else shown, calls

    def _held(self, start: int) -> int:
        """Characters at the end that are, or may become, a call."""
        if start >= 0:
            return len(self._text) - start
        return next((n for n in range(len(_MARK) - 1, 0, -1) if self._text.endswith(_MARK[:n])), 0)


def _read(text: str) -> Call | None:
    """None for what is no call after all: then it is left out, as an answer of `auto` that was cut short."""
    try:
        call = json.loads(text)
        return Call(f"call_{secrets.token_hex(12)}", str(call["name"]), json.dumps(call["arguments"]))
    except (ValueError, KeyError, TypeError):
        return None
