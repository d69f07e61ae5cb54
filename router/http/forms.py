"""Answers in the two forms of the OpenAI API, whole and in chunks. Pieces in, JSON-ready dictionaries out."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from python_backends.core.types import FinishReason, TokenLogprob
from router.http.tools import Call, CallFinder
from router.types import Piece, Proof

TokenText = Callable[[int], str]
Json = dict[str, Any]


@dataclass(slots=True)
class Tally:
    """Tokens of one choice. cached_tokens: of the prompt, that whoever prefilled did not compute."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def add(self, piece: Piece) -> None:
        self.prompt_tokens = piece.num_input_tokens
        self.completion_tokens += len(piece.token_ids)
        if piece.proof is not None:
            proof = piece.proof
            stored = proof.prefill_tokens_node + proof.prefill_tokens_remote
            self.cached_tokens = proof.prefill_tokens_reused + stored + proof.prefill_tokens_peer


class Form(ABC):
    """One response: its id, model and time, which all its chunks repeat."""

    def __init__(self, prefix: str, model: str, token_text: TokenText, *, choices: int, with_proof: bool) -> None:
        """choices: of each prompt; they lie one after the other."""
        self._head: Json = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._token_text = token_text
        self._choices = choices
        self._with_proof = with_proof

    @property
    def id(self) -> str:
        return str(self._head["id"])

    @abstractmethod
    def opening(self, index: int) -> Json | None:
        """The chunk that comes before a choice's first text."""

    @abstractmethod
    def chunk(self, index: int, piece: Piece) -> Json | None:
        """The chunk of one piece of choice `index`; None when there is nothing to say yet."""

    @abstractmethod
    def whole(self, pieces: Sequence[Piece]) -> Json:
        """The response that is not streamed: one whole piece per choice."""

    def usage_chunk(self, tallies: Sequence[Tally]) -> Json:
        """What a stream ends with when usage was asked for."""
        return {**self._chunk_head(), "choices": [], "usage": self._usage(tallies)}

    def counted(self, chunk: Json, tallies: Sequence[Tally]) -> Json:
        """The chunk with the usage so far."""
        return {**chunk, "usage": self._usage(tallies)}

    @abstractmethod
    def _chunk_head(self) -> Json: ...

    def _usage(self, tallies: Sequence[Tally]) -> Json:
        """Choices of one prompt share its tokens: they count once, as OpenAI does it."""
        firsts = tallies[:: self._choices]
        prompt = sum(tally.prompt_tokens for tally in firsts)
        completion = sum(tally.completion_tokens for tally in tallies)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(tally.cached_tokens for tally in firsts)},
        }

    def _proof(self, proofs: Sequence[Proof | None]) -> Json:
        """The field `baton`: the proof, or one per choice."""
        if not self._with_proof:
            return {}
        told = [msgspec.to_builtins(proof) for proof in proofs if proof is not None]
        return {"baton": {"proof": told[0] if len(told) == 1 else told}} if told else {}


class ChatForm(Form):
    def __init__(
        self,
        model: str,
        token_text: TokenText,
        *,
        choices: int,
        with_proof: bool,
        with_logprobs: bool,
        finders: Sequence[CallFinder] | None = None,
        with_blanks: bool = False,
    ) -> None:
        """finders: per choice, when there are tools to call. with_blanks: also chunks of tokens that say nothing yet."""
        super().__init__("chatcmpl", model, token_text, choices=choices, with_proof=with_proof)
        self._with_logprobs = with_logprobs
        self._finders = finders
        self._with_blanks = with_blanks

    def opening(self, index: int) -> Json | None:
        return self._choice_chunk(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, index: int, piece: Piece) -> Json | None:
        before = self._finders[index].found if self._finders else 0
        content, calls = self._content(index, piece)
        finish = self._finish(index, piece)
        logprobs = self._logprobs(piece.logprobs)
        if not (content or calls or finish or logprobs or self._with_blanks):
            return None
        delta: Json = {"content": content} if content or not (finish or calls) else {}
        if calls:
            delta["tool_calls"] = [{"index": before + number, **call.as_json()} for number, call in enumerate(calls)]
        return {**self._choice_chunk(index, delta, logprobs, finish), **self._proof([piece.proof])}

    def whole(self, pieces: Sequence[Piece]) -> Json:
        choices = [self._whole_choice(index, piece) for index, piece in enumerate(pieces)]
        head = {**self._head, "object": "chat.completion", "choices": choices}
        head["usage"] = self._usage([tally(piece) for piece in pieces])
        return {**head, **self._proof([piece.proof for piece in pieces])}

    def _whole_choice(self, index: int, piece: Piece) -> Json:
        content, calls = self._content(index, piece)
        message: Json = {"role": "assistant", "content": content if content or not calls else None, "refusal": None}
        if calls:
            message["tool_calls"] = [call.as_json() for call in calls]
        logprobs = self._logprobs(piece.logprobs)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self._finish(index, piece)}

    def _content(self, index: int, piece: Piece) -> tuple[str, list[Call]]:
        """(text, calls) of a piece."""
        if self._finders is None:
            return piece.text, []
        return self._finders[index].push(piece.text, final=piece.finish_reason is not None)

    def _finish(self, index: int, piece: Piece) -> str | None:
        if piece.finish_reason is None:
            return None
        called = self._finders is not None and self._finders[index].found > 0
        return "tool_calls" if called and piece.finish_reason is FinishReason.STOP else piece.finish_reason.value

    def _choice_chunk(self, index: int, delta: Json, logprobs: Json | None, finish: str | None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._chunk_head(), "choices": [choice]}

    def _chunk_head(self) -> Json:
        return {**self._head, "object": "chat.completion.chunk"}

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> Json | None:
        if not self._with_logprobs:
            return None
        content = [
            {
                **self._token(entry.token_id, entry.logprob),
                "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in entry.top],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> Json:
        text = self._token_text(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class CompletionForm(Form):
    def __init__(
        self,
        model: str,
        token_text: TokenText,
        *,
        choices: int,
        with_proof: bool,
        with_logprobs: bool,
        echoes: Sequence[str],
    ) -> None:
        """echoes: per choice, what is put before its text."""
        super().__init__("cmpl", model, token_text, choices=choices, with_proof=with_proof)
        self._with_logprobs = with_logprobs
        self._echoes = echoes
        self._offsets = [len(echo) for echo in echoes]  # characters of each choice so far

    def opening(self, index: int) -> Json | None:
        return self._choice_chunk(index, self._echoes[index], None, None) if self._echoes[index] else None

    def chunk(self, index: int, piece: Piece) -> Json:
        finish = piece.finish_reason.value if piece.finish_reason else None
        logprobs = self._logprobs(index, piece.logprobs)
        return {**self._choice_chunk(index, piece.text, logprobs, finish), **self._proof([piece.proof])}

    def whole(self, pieces: Sequence[Piece]) -> Json:
        choices = [
            {
                "index": index,
                "text": self._echoes[index] + piece.text,
                "logprobs": self._logprobs(index, piece.logprobs),
                "finish_reason": piece.finish_reason.value if piece.finish_reason else None,
            }
            for index, piece in enumerate(pieces)
        ]
        head = {
            **self._head,
            "object": "text_completion",
            "choices": choices,
            "usage": self._usage([tally(piece) for piece in pieces]),
        }
        return {**head, **self._proof([piece.proof for piece in pieces])}

    def _choice_chunk(self, index: int, text: str, logprobs: Json | None, finish: str | None) -> Json:
        return {
            **self._chunk_head(),
            "choices": [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}],
        }

    def _chunk_head(self) -> Json:
        return {**self._head, "object": "text_completion"}

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> Json | None:
        if not self._with_logprobs:
            return None
        texts = [self._token_text(entry.token_id) for entry in entries]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{self._token_text(token): logprob for token, logprob in entry.top} for entry in entries],
            "text_offset": offsets,
        }


def tally(piece: Piece) -> Tally:
    """Of a whole answer."""
    made = Tally()
    made.add(piece)
    return made
