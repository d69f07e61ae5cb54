"""The environment of a worker's process, set before torch, MPI or TensorRT-LLM are loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, MutableMapping

from python_backends.core.trtllm import lists_tcp

log = logging.getLogger(__name__)

# Variables by which a process takes part in an MPI job. A server that was started by mpirun passes them on to its model
# processes, and MPI would then believe to be in that job. OMPI_MCA_* and PMIX_MCA_* are configuration and stay.
_MPI_JOB = (
    "OMPI_COMM_WORLD_",
    "OMPI_UNIVERSE_",
    "OMPI_APP_CTX_",
    "OMPI_FIRST_RANKS",
    "OMPI_MCA_orte_",
    "ORTE_",
    "PMIX_",
    "PMI_",
)


def prepare(environment: MutableMapping[str, str], gpus: str, num_gpus: int, given: Mapping[str, str]) -> None:
    """Change `environment` (os.environ) for one worker: its GPUs, no MPI job, and what the deployment file gives."""
    for name in [name for name in environment if name.startswith(_MPI_JOB) and not name.startswith("PMIX_MCA_")]:
        del environment[name]
    environment["CUDA_VISIBLE_DEVICES"] = gpus
    environment["TRTLLM_VISIBLE_DEVICES"] = gpus  # for the processes that MPI starts
    if os.geteuid() == 0:  # Open MPI refuses to start processes as root otherwise; containers run as root
        environment.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
        environment.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    if num_gpus == 1:
        # No MPI spawn: it can hang, and its process would outlive a killed worker and keep the GPU's memory.
        environment.setdefault("TLLM_WORKER_USE_SINGLE_PROCESS", "1")
    inherited = environment.get("UCX_TLS")
    if inherited is not None and "UCX_TLS" not in given and lists_tcp(inherited):
        log.warning("UCX_TLS=%s was inherited and is dropped: with tcp UCX takes GPU memory for host memory", inherited)
        del environment["UCX_TLS"]
    environment.update(given)
