"""The PyTorch engine: the paged engine over a TorchRunner, with its threads and cores set before torch starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import msgspec

from python_backends.core.config import Deployment, WorkerConfig, parse_cpus
from python_backends.core.errors import ConfigError
from python_backends.core.paths import resolve_model
from python_backends.core.types import Epoch, Role
from python_backends.engines.paged.engine import PagedEngine
from python_backends.engines.torch.cores import shared_cores


def create(deployment: Deployment, worker: WorkerConfig, epoch: Epoch, key: bytes) -> PagedEngine:
    """Raises ConfigError when cores, device or model directory are wrong."""
    threads = _claim_cores(worker, _sharing(worker, deployment.workers))
    import torch  # only now: OpenMP reads its environment when torch is loaded

    from python_backends.engines.torch.device import reach_each_other
    from python_backends.engines.torch.runner import TorchRunner

    torch.set_num_threads(threads)
    if worker.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"workers: {worker.name}: device {worker.device!r}, but torch sees no GPU here; use device: cpu")
    deployment = between_gpus(deployment, reach_each_other)
    engine, model_path = deployment.engine, resolve_model(deployment.model.path)
    lenders = [other.name for other in _sharing(worker, deployment.workers) if _may_lend(other)]
    board = None
    if engine.elastic_cores and worker.name in lenders:
        board = shared_cores(lenders, worker.name, threads, key)
    runner = TorchRunner(deployment.model, worker, engine.block_size, model_path, engine.kernels, board, engine.max_batch)
    return PagedEngine(deployment, worker, runner, epoch, key)


def between_gpus(deployment: Deployment, reach_each_other: Callable[[set[str]], bool]) -> Deployment:
    """The deployment whose transport `auto` is cuda_ipc, if all its workers are on GPUs of this host that reach each other.

    All workers read the same file, hence decide alike: KV that may stay on GPUs is not copied to the host for nobody.
    """
    devices = {worker.device for worker in deployment.workers}
    here = not (deployment.cluster.listen or deployment.cluster.pools or deployment.cluster.registry)
    ours = all(worker.engine == "torch" and worker.device != "cpu" for worker in deployment.workers)
    if deployment.transfer.transport != "auto" or not (here and ours) or not reach_each_other(devices):
        return deployment
    transfer = msgspec.structs.replace(deployment.transfer, transport="cuda_ipc")
    return msgspec.structs.replace(deployment, transfer=transfer)


def _sharing(worker: WorkerConfig, workers: Sequence[WorkerConfig]) -> list[WorkerConfig]:
    """Prefill and decode workers share the machine; an aggregated one beside them is idle as long as they live.

    That follows the deployment: a worker whose role was changed since keeps its place, where the others expect it.
    """
    standby = {other.name for other in workers if other.role is Role.AGGREGATED}
    return [other for other in workers if (other.name in standby) == (worker.name in standby)]


def _may_lend(worker: WorkerConfig) -> bool:
    """Not those whose cores or threads were chosen by hand: they keep to them."""
    return worker.device == "cpu" and not worker.cpus and not worker.threads


def _claim_cores(worker: WorkerConfig, sharing: Sequence[WorkerConfig]) -> int:
    """Pin this process if asked to, and say how many threads it computes with."""
    available = os.sched_getaffinity(0)
    cpus = set(parse_cpus(worker.cpus))
    if not cpus <= available:
        missing = sorted(cpus - available)
        raise ConfigError(f"workers: {worker.name}: cpus {worker.cpus!r}: this machine does not give core {missing[0]}")
    if cpus:
        os.sched_setaffinity(0, cpus)
    threads = worker.threads or len(cpus) or max(1, len(available) // len(sharing))
    # Spinning OpenMP threads of one worker take the cores of the others.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return threads
