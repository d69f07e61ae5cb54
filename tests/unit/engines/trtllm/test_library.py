from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from python_backends.core.errors import ConfigError
from python_backends.core.paths import repository_root
from python_backends.engines.trtllm.library import CONTAINER, Library, load_library
from tests.engines.trtllm.playing import playing


def library(version: str) -> Library:
    return Library(version, None, None, None, None, Exception)


@pytest.mark.parametrize(
    ("version", "applies"),
    [("1.1.0", False), ("1.2.1", False), ("1.2.0rc6", False), ("1.3.0rc23", False), ("1.3.0rc24", True), ("1.3.0", True)],
)
def test_penalties_by_release(version: str, applies: bool) -> None:
    assert library(version).applies_penalties is applies


def test_where_there_is_no_tensorrt_llm_the_container_is_named() -> None:
    with pytest.raises(ConfigError, match=CONTAINER):
        load_library()


def test_a_release_that_would_hold_kv_for_ever_is_refused(tmp_path: Path) -> None:
    with playing("1.0.0", tmp_path), pytest.raises(ConfigError, match=r"1\.0\.0 is too old"):
        load_library()


@pytest.mark.parametrize("version", ["1.1.0", "1.2.1", "1.3.0"])
def test_fields_by_release(version: str, tmp_path: Path) -> None:
    with playing(version, tmp_path):
        fields = load_library().params_fields
    assert {"first_gen_tokens", "ctx_request_id", "opaque_state", "draft_tokens"} <= fields
    assert ("disagg_request_id" in fields) is (version == "1.3.0")


@pytest.mark.parametrize("version", ["1.1.0", "1.2.1", "1.3.0"])
def test_a_speculative_config_becomes_what_the_release_takes(version: str, tmp_path: Path) -> None:
    plain = {"model": "m", "max_batch_size": 4}
    given = {**plain, "speculative_config": {"decoding_type": "MTP", "num_nextn_predict_layers": 2}}
    with playing(version, tmp_path):
        loaded = load_library()
        assert loaded.typed(plain) == plain
        parse = importlib.import_module("tensorrt_llm._arguments").parse
        args = parse(loaded.typed(given))
        assert (args.speculative_config.decoding_type, args.speculative_config.drafts) == ("MTP", 2)
        with pytest.raises(ValueError, match="Guessing"):
            parse(loaded.typed({**plain, "speculative_config": {"decoding_type": "Guessing"}}))


def test_tensorrt_llm_is_imported_in_two_functions_only() -> None:
    """At import time of the engine the environment of the worker is not set yet."""
    found = []
    for path in [*(repository_root() / "python_backends").rglob("*.py"), *(repository_root() / "router").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "tensorrt_llm" for name in names):
                while not isinstance(node, ast.FunctionDef | ast.Module):
                    node = parents[node]
                found.append((path.name, getattr(node, "name", "the module")))
    assert set(found) == {("library.py", "load_library"), ("library.py", "typed")}


def test_importing_the_engine_loads_neither_torch_nor_tensorrt_llm() -> None:
    program = (
        "import sys, python_backends.engines.trtllm.engine; print([m for m in sys.modules if m in ('torch', 'tensorrt_llm')])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=repository_root(), capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
