"""Which transport `auto` is, before anything of it is made."""

from __future__ import annotations

import pytest

from python_backends.core.config import ClusterConfig, Deployment, ModelConfig, TransferConfig, WorkerConfig
from python_backends.core.types import Role
from python_backends.engines.torch.engine import between_gpus


def deployment(*devices: str, transport: str = "auto", engine: str = "torch", listen: str = "") -> Deployment:
    workers = tuple(WorkerConfig(Role.DECODE, f"w{i}", engine, device=device) for i, device in enumerate(devices))
    return Deployment(
        model=ModelConfig(),
        workers=workers,
        transfer=TransferConfig(transport=transport),  # type: ignore[arg-type]
        cluster=ClusterConfig(listen=listen),
    )


def test_between_gpus_that_reach_each_other_it_is_cuda_ipc() -> None:
    asked: list[set[str]] = []
    made = between_gpus(deployment("cuda:0", "cuda:1"), lambda devices: not asked.append(devices))  # type: ignore[func-returns-value]
    assert made.transfer.transport == "cuda_ipc"
    assert asked == [{"cuda:0", "cuda:1"}]


@pytest.mark.parametrize(
    "given",
    [
        deployment("cuda:0", "cpu"),
        deployment("cuda", transport="shm"),
        deployment("cuda", engine="fake"),
        deployment("cuda", listen="0.0.0.0"),  # workers of other servers read its KV, too
    ],
)
def test_else_it_stays(given: Deployment) -> None:
    assert between_gpus(given, lambda _: True) is given


def test_gpus_that_do_not_reach_each_other_hand_over_by_the_host() -> None:
    assert between_gpus(deployment("cuda:0", "cuda:1"), lambda _: False).transfer.transport == "auto"
