"""A model repository whose worker models find the fake tensorrt_llm.

Triton's Python stub ignores PYTHONPATH, and the product has no switch for fakes. So tests serve worker models of their
own: a model.py that puts the fake on the path and then is the product's.
"""

from __future__ import annotations

from pathlib import Path

from python_backends.core.config import load_deployment
from python_backends.core.paths import repository_root
from python_backends.core.types import Role
from tests.engines.trtllm.playing import FAKES, RELEASES, Knobs

_MODEL = """
import os
import sys
from pathlib import Path

sys.path[:0] = [{root!r}, {fakes!r}]
os.environ["FAKE_TENSORRT_LLM"] = str(Path({knobs!r}) / (Path(__file__).parents[1].name + ".json"))

from python_backends.triton.worker_model import WorkerModel as TritonPythonModel
"""


def write_models(directory: Path, config: Path, **knobs: object) -> dict[str, Knobs]:
    """Make `directory`/models for the deployment file `config`. Returns the knobs of each worker by name."""
    product = repository_root() / "model_repository"
    models = directory / "models"
    models.mkdir()
    (models / "router").symlink_to(product / "router")
    for role in Role:
        (models / role.value / "1").mkdir(parents=True)
        (models / role.value / "config.pbtxt").symlink_to(product / role.value / "config.pbtxt")
        text = _MODEL.format(root=str(repository_root()), fakes=str(FAKES), knobs=str(directory))
        (models / role.value / "1" / "model.py").write_text(text)
    made = {}
    for worker in load_deployment(config).workers:
        made[worker.name] = Knobs(directory / f"{worker.name}.json", RELEASES["1.2"])
        made[worker.name].set(**knobs)
    return made
