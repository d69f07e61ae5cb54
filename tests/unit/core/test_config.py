from __future__ import annotations

from pathlib import Path

import pytest

from python_backends.core.config import Deployment, load_deployment, parse_cpus
from python_backends.core.errors import ConfigError
from python_backends.core.types import Role

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "deployment.yaml"


def load(file: Path, text: str) -> Deployment:
    file.write_text(text)
    return load_deployment(file)


def complaint(file: Path, text: str) -> str:
    """The message about a wrong file; it always names the file."""
    with pytest.raises(ConfigError) as error:
        load(file, text)
    assert str(error.value).startswith(f"{file}: ")
    return str(error.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_deployments_are_valid(path: Path) -> None:
    load_deployment(path)


def test_shortest_deployment_has_defaults(file: Path) -> None:
    deployment = load(file, "workers: [{role: aggregated}]")
    assert deployment.worker("aggregated").role is Role.AGGREGATED
    assert (deployment.engine.block_size, deployment.transfer.transport) == (16, "auto")


def test_workers_are_named_by_role_and_number(file: Path) -> None:
    text = "workers: [{role: prefill}, {role: decode}, {role: prefill}, {role: decode, name: fast}, {role: decode}]"
    deployment = load(file, text)
    assert [worker.name for worker in deployment.workers] == ["prefill", "decode", "prefill_1", "fast", "decode_2"]
    assert [worker.id for worker in deployment.workers] == [worker.name for worker in deployment.workers]


def test_unknown_worker_is_named_with_the_known_ones(file: Path) -> None:
    deployment = load(file, "workers: [{role: prefill}, {role: decode}]")
    with pytest.raises(ConfigError, match=r"'decode_7'.*prefill, decode"):
        deployment.worker("decode_7")


DECODE = "workers: [{role: decode}]\n"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        # unknown keys
        (DECODE + "engin: {}", "engin"),
        (DECODE + "engine: {block_sise: 16}", "block_sise"),
        ("workers: [{role: decode, cpu: 0}]", "workers"),
        # wrong types
        (DECODE + "engine: {block_size: big}", "engine.block_size"),
        (DECODE + "engine: {block_size: 1.5}", "engine.block_size"),
        (DECODE + "health: {restart: 1}", "health.restart"),
        (DECODE + "model: []", "model"),
        ("workers: {role: decode}", "workers"),
        ("workers: [{role: both}]", "role"),
        ("workers: [{}]", "role"),
        ("[]", "object"),
        ("", "object"),
        # out of bounds
        (DECODE + "engine: {block_size: 0}", "engine.block_size"),
        (DECODE + "transfer: {lease_s: 0}", "transfer.lease_s"),
        (DECODE + "transfer: {faults: {drop: 1.5}}", "transfer.faults"),
        (DECODE + "transfer: {faults: {explode: 0.5}}", "transfer.faults"),
        (DECODE + "transfer: {transport: pigeon}", "transfer.transport"),
        (DECODE + "transfer: {transport: nixl, codec: lossless}", "transfer.codec: lossless is for transport tcp; nixl moves"),
        (DECODE + "transfer: {transport: shm, codec: lossless}", "transfer.codec: lossless is for transport tcp; shm moves"),
        (DECODE + "transfer: {transport: cuda_ipc, rounding: int8}", "transfer.rounding: int8 can't be done by transport"),
        (DECODE + "router: {mode: magic}", "router.mode"),
        (DECODE + "model: {dtype: int4}", "model.dtype"),
        ("workers: []", "workers"),
        ("{}", "workers"),
        ("workers: [{role: decode, device: tpu}]", "device"),
        ("workers: [{role: decode, name: Decode-1}]", "name"),
        ("workers: [{role: decode, cpus: all}]", "cpus"),
        # deployments that can't work
        ("workers: [{role: decode}, {role: decode, name: decode}]", "'decode' is given twice"),
        ("workers: [{role: decode, name: a}, {role: prefill, name: a}]", "'a' is given twice"),
        ("workers: [{role: decode, name: router}]", "'router'"),
        ("workers: [{role: prefill}]", "nobody can decode"),
        ("workers: [{role: prefill}, {role: aggregated}]", "need a decode worker"),
        ("workers: [{role: decode, cpus: 3-1}]", "decode: cpus"),
        ("workers: [{role: decode, cpus: 1--2}]", "decode: cpus"),
        (DECODE + "cluster: {tls_certificate: a, tls_key: b}", "cluster.tls_certificate"),
        (DECODE + "cluster: {grpc_certificate: a}", "cluster.grpc_certificate"),
        (DECODE + "cluster: {grpc_client_ca: a}", "cluster.grpc_certificate"),
        # not YAML
        ("workers: [", "not YAML"),
        ("a: b: c", "not YAML"),
    ],
)
def test_wrong_file_is_refused_by_key(file: Path, text: str, key: str) -> None:
    assert key in complaint(file, text)


def test_message_about_yaml_is_one_line(file: Path) -> None:
    assert "\n" not in complaint(file, "workers: [\n  {role: decode\n")


def test_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: No such file"):
        load_deployment(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="directory"):
        load_deployment(tmp_path)


def test_binary_file_is_not_yaml(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="not YAML"):
        load_deployment(file)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("", []), ("0", [0]), ("0-3,8", [0, 1, 2, 3, 8]), ("8,0-1", [0, 1, 8]), ("1,1,0-2", [0, 1, 2]), ("2-2", [2])],
)
def test_cpus(text: str, cpus: list[int]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["x", "3-1", "-1", "-", "1-x", "1.5", "1 - x"])
def test_wrong_cpus_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^here: .* is not a list of cores"):
        parse_cpus(text, "here")
