"""Small tokenizers of the two kinds in use, written as model directories."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "A relay race: the prompt is run first, then the baton is handed over.",
    "Größe, café, naïve, Ελλάδα, привет мир.",
    "你好，世界。你好吗？ 日本語のテキスト。",
    "👩‍🚀 🚀 🎉 and back to plain text\nwith lines\n\n  and indents",
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# With BOS, an indented block, trimming, tojson, a loop control and a refusal: what real templates use.
INSTRUCT = """{{ bos_token }}
{%- for message in messages %}
    {% if message.role == 'tool' %}{{ raise_exception('tool messages are not known, <' ~ loop.index0 ~ '>') }}{% endif %}
    {% if message.role == 'skip' %}{% continue %}{% endif %}
    {% if message.role == 'user' %}
[INST] {{ message.content | trim }} [/INST]
    {%- elif message.role == 'data' %}
{{ message | tojson }}
    {% else %}
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
"""


def byte_level(directory: Path, chat_template: object = CHATML) -> Path:
    """GPT-2's kind: every byte is a token, characters of several bytes are often several tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    config = {"bos_token": "<|im_start|>", "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}}
    return _write(directory, tokenizer, {**config, "chat_template": chat_template})


def byte_fallback(directory: Path, chat_template: object = INSTRUCT) -> Path:
    """Llama's kind: spaces are ▁, one before the text; characters not in the vocabulary are <0x..> tokens; BOS is added."""
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = _metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    trained.train_from_iterator([word for sentence in SENTENCES[:2] for word in sentence.split()], trainer)
    model = json.loads(trained.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    merges = [(left, right) for left, right in model["merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = _metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return _write(directory, tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "chat_template": chat_template})


def _metaspace() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def _write(directory: Path, tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    kept = {key: value for key, value in config.items() if value is not None}
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **kept})
    (directory / "tokenizer_config.json").write_text(text)
    return directory
