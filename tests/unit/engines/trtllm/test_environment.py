from __future__ import annotations

import os

import pytest

from python_backends.engines.trtllm.environment import prepare


def prepared(before: dict[str, str], gpus: str = "3", given: dict[str, str] | None = None) -> dict[str, str]:
    environment = dict(before)
    prepare(environment, gpus, len(gpus.split(",")), given or {})
    return environment


def test_the_worker_sees_its_gpus_and_no_others() -> None:
    environment = prepared({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "1,3")
    assert environment["CUDA_VISIBLE_DEVICES"] == environment["TRTLLM_VISIBLE_DEVICES"] == "1,3"


def test_an_mpi_job_around_the_server_is_forgotten_and_configuration_is_kept() -> None:
    job = ["OMPI_COMM_WORLD_SIZE", "OMPI_UNIVERSE_SIZE", "OMPI_APP_CTX_NUM_PROCS", "OMPI_FIRST_RANKS", "OMPI_MCA_orte_ess"]
    job += ["ORTE_SCHIZO", "PMIX_RANK", "PMIX_SERVER_URI4", "PMI_FD"]
    kept = {"OMPI_MCA_pml": "ob1", "PMIX_MCA_gds": "hash", "PATH": "/bin", "UCX_NET_DEVICES": "mlx5_0:1"}
    environment = prepared({**dict.fromkeys(job, "1"), **kept})
    assert not set(job) & environment.keys()
    assert kept.items() <= environment.items()


def test_one_gpu_needs_no_mpi_process_and_the_file_may_say_otherwise() -> None:
    assert prepared({})["TLLM_WORKER_USE_SINGLE_PROCESS"] == "1"
    assert "TLLM_WORKER_USE_SINGLE_PROCESS" not in prepared({}, "0,1")
    given = {"TLLM_WORKER_USE_SINGLE_PROCESS": "0"}
    assert prepared({}, given=given)["TLLM_WORKER_USE_SINGLE_PROCESS"] == "0"


@pytest.mark.parametrize(
    ("inherited", "given", "left"),
    [
        ("tcp", {}, None),
        ("rc,tcp,cuda_copy", {}, None),
        ("^tcp", {}, "^tcp"),
        ("cuda_copy,cuda_ipc", {}, "cuda_copy,cuda_ipc"),
        ("tcp", {"UCX_TLS": "^ib"}, "^ib"),
    ],
)
def test_an_inherited_tcp_is_dropped(inherited: str, given: dict[str, str], left: str | None) -> None:
    assert prepared({"UCX_TLS": inherited}, given=given).get("UCX_TLS") == left


def test_root_may_start_mpi_processes() -> None:
    environment = prepared({})
    assert ("OMPI_ALLOW_RUN_AS_ROOT" in environment) == (os.geteuid() == 0)
