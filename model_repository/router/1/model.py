"""The router; see router/triton/router_model.py."""

import sys
from pathlib import Path

# Triton puts neither the working directory nor PYTHONPATH of ours on the path: the root is found from this file.
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from router.triton.router_model import RouterModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
