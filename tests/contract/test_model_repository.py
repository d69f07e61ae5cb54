"""config.pbtxt against core/tensors.py, both ways; models thin; every deployment file loads."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from python_backends.core.config import load_deployment
from python_backends.core.paths import repository_root
from python_backends.core.tensors import MODELS, TensorSpec

ROOT = repository_root()
Row = tuple[str, str, tuple[int, ...], bool]


def _config(model: str) -> ModelConfig:
    return text_format.Parse((ROOT / "model_repository" / model / "config.pbtxt").read_text(), ModelConfig())


def _declared(specs: tuple[TensorSpec, ...], *, inputs: bool) -> list[Row]:
    return sorted((spec.name, f"TYPE_{spec.dtype}", spec.dims, inputs and spec.optional) for spec in specs)


@pytest.mark.parametrize("model", sorted(MODELS))
def test_config_and_table_say_the_same(model: str) -> None:
    config = _config(model)
    inputs, outputs = MODELS[model]
    written = sorted((t.name, DataType.Name(t.data_type), tuple(t.dims), t.optional) for t in config.input)
    assert written == _declared(inputs, inputs=True)
    written = sorted((t.name, DataType.Name(t.data_type), tuple(t.dims), False) for t in config.output)
    assert written == _declared(outputs, inputs=False)


def test_the_repository_has_exactly_the_models_of_the_table() -> None:
    assert sorted(path.name for path in (ROOT / "model_repository").iterdir()) == sorted(MODELS)


@pytest.mark.parametrize("model", sorted(MODELS))
def test_one_instance_on_the_cpu_and_no_name(model: str) -> None:
    """Workers are addressed as models, and further workers are links to the same folder."""
    config = _config(model)
    (group,) = config.instance_group
    assert group.count == 1
    assert config.name == ""
    assert config.model_transaction_policy.decoupled is (model == "router")


@pytest.mark.parametrize("model", sorted(MODELS))
def test_model_files_are_thin(model: str) -> None:
    assert len((ROOT / "model_repository" / model / "1" / "model.py").read_text().splitlines()) < 15


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_deployment_files_load(path: Path) -> None:
    assert load_deployment(path).workers
