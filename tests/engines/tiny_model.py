"""A tiny random Llama in a Hugging Face directory, made without transformers: for engine tests that need a real model.

Its tokenizer has a token for every byte.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from python_backends.engines.torch.architecture import load_architecture
from python_backends.engines.torch.weights import expected_tensors

VOCAB = 320

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def write_tiny_llama(directory: Path, seed: int = 0, **config: object) -> Path:
    """Weights large enough that the next token depends on all of the context. `config`: other values than its own."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**_CONFIG, **config}))
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.12
        for name, shape in expected_tensors(load_architecture(directory)).items()
    }
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 2 are special (2 ends a text), then one for each byte."""
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate([*special, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer
