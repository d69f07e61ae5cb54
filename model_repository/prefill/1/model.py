"""A prefill worker; see python_backends/triton/worker_model.py."""

import sys
from pathlib import Path

# Triton puts neither the working directory nor PYTHONPATH of ours on the path: the root is found from this file.
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from python_backends.triton.worker_model import WorkerModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
