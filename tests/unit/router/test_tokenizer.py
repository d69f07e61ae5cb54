from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from python_backends.core.errors import ConfigError, InvalidRequest
from router.tokenizer import Tokenizer
from tests.unit.router.model_dirs import CHATML, INSTRUCT, SENTENCES, byte_fallback, byte_level

Build = Callable[..., Path]

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Größe <b>你好</b> & 'more'?\n"},
    {"role": "assistant", "content": "👩‍🚀"},
    {"role": "user", "content": ""},
]


@pytest.fixture(params=[byte_level, byte_fallback])
def build(request: pytest.FixtureRequest) -> Build:
    found: Build = request.param
    return found


# --- as transformers does -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, INSTRUCT])
def test_same_ids_and_text_as_transformers(build: Build, template: str, tmp_path: Path) -> None:
    model = build(tmp_path, template)
    ours, theirs = Tokenizer(model), transformers.AutoTokenizer.from_pretrained(model)
    for text in (*SENTENCES, "", " leading", "🦊 <|im_end|> </s>"):
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.vocab_size == len(theirs)
    for chat in (CHAT, [*CHAT, {"role": "skip", "content": "x"}, {"role": "data", "content": "<é>", "name": "n"}]):
        assert ours.render_chat(chat) == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert ours.encode_chat(chat) == theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


def test_chatml(tmp_path: Path) -> None:
    rendered = Tokenizer(byte_level(tmp_path)).render_chat([{"role": "user", "content": "Hi"}])
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_chat_has_one_bos_and_a_plain_prompt_too(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_fallback(tmp_path))
    assert tokenizer.encode("dog").count(1) == 1
    assert tokenizer.encode_chat([{"role": "user", "content": "dog"}]).count(1) == 1


def test_the_day_can_be_asked_for(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_level(tmp_path, "{{ strftime_now('%Y') }}"))
    before = time.strftime("%Y")
    assert before <= tokenizer.render_chat(CHAT) <= time.strftime("%Y")


# --- where the template is ----------------------------------------------------------------------------------------


def test_a_jinja_file_wins(tmp_path: Path) -> None:
    model = byte_level(tmp_path)
    (model / "chat_template.jinja").write_text("from the file")
    assert Tokenizer(model).render_chat(CHAT) == "from the file"


def test_of_named_templates_the_default_is_used(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert Tokenizer(byte_level(tmp_path, named)).render_chat(CHAT) == "plain"


def test_without_a_template_only_text_is_served(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_level(tmp_path, None))
    with pytest.raises(InvalidRequest, match="text_input"):
        tokenizer.encode_chat(CHAT)
    assert tokenizer.encode("dog")


def test_tokenizer_config_is_optional(tmp_path: Path) -> None:
    model = byte_level(tmp_path)
    (model / "tokenizer_config.json").unlink()
    assert Tokenizer(model).decode(Tokenizer(model).encode("dog")) == "dog"


# --- requests that are wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "messages must be"),
        ("hello", "messages must be"),
        ({"role": "user", "content": "x"}, "messages must be"),
        (["hello"], r"messages\[0\] must be an object"),
        ([CHAT[0], {"content": "x"}], r"messages\[1\]\.role"),
        ([{"role": 3, "content": "x"}], r"messages\[0\]\.role"),
        ([{"role": "user"}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], r"messages\[0\]\.content"),
    ],
)
def test_bad_messages_are_named(messages: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=named):
        Tokenizer(byte_level(tmp_path)).encode_chat(messages)


def test_what_the_template_says_reaches_the_client(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_fallback(tmp_path))
    with pytest.raises(InvalidRequest, match="tool messages are not known, <1>"):
        tokenizer.encode_chat([CHAT[1], {"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    "source", ["{{ messages[9].content.x }}", "{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ ''.__class__.mro() }}"]
)
def test_a_template_that_breaks_is_a_bad_request(source: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="chat template"):
        Tokenizer(byte_level(tmp_path, source)).render_chat(CHAT)


def test_text_that_is_no_unicode_is_a_bad_request(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_level(tmp_path))
    with pytest.raises(InvalidRequest, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        tokenizer.encode_chat([{"role": "user", "content": "\ud83d"}])


# --- model directories that are wrong -----------------------------------------------------------------------------


def test_a_missing_tokenizer_is_named_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing; give a model directory"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "not json"])
def test_a_broken_tokenizer_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", "\x00"])
def test_a_broken_tokenizer_config_is_named(text: str, tmp_path: Path) -> None:
    model = byte_level(tmp_path)
    (model / "tokenizer_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        Tokenizer(model)


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("a\n{% if %}", "line 2"),
        ([{"name": "rag", "template": "x"}], "'default'"),
        ([{"nom": "x"}], "name and template"),
        (7, "string"),
    ],
)
def test_a_broken_template_is_named_at_load(template: object, named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        Tokenizer(byte_level(tmp_path, template))


# --- the rest -----------------------------------------------------------------------------------------------------


def test_limits_left_by_training_are_lifted(tmp_path: Path) -> None:
    model = byte_level(tmp_path)
    path = model / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    plain = Tokenizer(model).encode(SENTENCES[0])
    path.write_text(json.dumps(raw))
    assert len(plain) > 3
    assert Tokenizer(model).encode(SENTENCES[0]) == plain


def test_token_texts_make_up_the_text(build: Build, tmp_path: Path) -> None:
    tokenizer = Tokenizer(build(tmp_path))
    ids = tokenizer.encode("The dog and the race")
    texts = [tokenizer.token_text(token_id) for token_id in ids if not tokenizer.is_silent(token_id)]
    assert "".join(texts).lstrip() == "The dog and the race"
    assert any(text.startswith(" ") for text in texts[1:])


def test_token_text_shows_special_tokens_and_broken_bytes(build: Build, tmp_path: Path) -> None:
    tokenizer = Tokenizer(build(tmp_path))
    assert tokenizer.token_text(0) in {"<|endoftext|>", "<unk>"}
    assert tokenizer.token_text(tokenizer.encode("🦊")[-1]) == "\ufffd"


def test_silent_tokens(build: Build, tmp_path: Path) -> None:
    tokenizer = Tokenizer(build(tmp_path))
    assert tokenizer.is_silent(0)
    assert tokenizer.is_silent(tokenizer.vocab_size + 3)
    assert tokenizer.decode([0, tokenizer.vocab_size + 3]) == ""
    assert not tokenizer.is_silent(tokenizer.encode("dog")[-1])
