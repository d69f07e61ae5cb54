"""Every command of the README and the guides, as their readers type them: one server, one page after the other.

Blocks marked `sh` and `python` are run, `yaml` blocks are loaded as deployments. What is not run stands in a table here with
the reason and the test that runs it instead; a page says by the line above a block that it needs another machine.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from loadtest.options import read_options
from python_backends.core.config import load_deployment
from python_backends.core.paths import repository_root
from scripts.tritonserver import TritonServer

pytestmark = [pytest.mark.triton, pytest.mark.weights]

ROOT = repository_root()
PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("quickstart", "why", "profile", "loadtest", "doctor")),
    *(f"docs/guides/{path.name}" for path in sorted((ROOT / "docs" / "guides").glob("*.md"))),
)

ELSEWHERE = {
    "On a machine with GPUs and Docker:": "no GPU and no container here; tests/contract/test_launch.py runs scripts as in one",
    "Inside the container:": "the same; tests/triton/test_trtllm.py runs scripts/verify-gpu and the deployment over a fake",
}
"""Lines above a block that say where it runs, and why not here."""
NOT_RUN = {
    "scripts/install": "would change the environment that the tests run in",
    "scripts/install --dev": "the same",
    "scripts/test": "is what runs this",
}
OPTIONS_ONLY = {
    "serve": "tests/triton/test_scripts.py::test_serve_prints_a_curl_line_that_works_and_stops_on_ctrl_c",
    "loadtest": "tests/triton/test_loadtest.py::test_the_mixed_load",
    "compare": "tests/triton/test_loadtest.py::test_a_comparison_of_two_deployments",
    "soak": "tests/unit/scripts/test_soak.py::test_growth_beyond_noise_is_named",
    "role": "tests/triton/test_drain.py::test_another_role_under_load_is_kept_when_the_worker_dies",
    "profile": "tests/triton/test_profile.py::test_a_running_server_is_profiled",
}
"""Scripts that take long or start servers. Their options are read and the files they name opened; this test runs them."""
TYPED = "What is the capital of France?\n"
METRICS_S = 10.0  # metrics follow what happens a few times a second


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. `above`: the line before it that is not empty."""

    language: str
    text: str
    above: str


def blocks(page: str) -> Iterator[Block]:
    fence = re.compile(r"^([^\n]*)\n\s*^( *)```(\w*)\n(.*?)^\2```$", re.MULTILINE | re.DOTALL)
    for found in fence.finditer(re.sub(r"\n+(?= *```\w)", "\n", (ROOT / page).read_text())):
        yield Block(found[3], textwrap.dedent(found[4]), found[1].strip())


def commands(text: str) -> list[str]:
    """Of a shell block, without comments, continued lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s{2,})# .*$", "", line).strip() for line in lines) if line]


class Reader:
    """Does what the pages say in a directory that looks like a clone of the repository."""

    def __init__(self, server: TritonServer, clone: Path, done: set[str]) -> None:
        """`done`: what earlier pages said, too, and is not done again."""
        self.clone = clone
        self._done = done
        self._ports = {
            8000: server.http_port,
            8001: server.grpc_port,
            8002: server.metrics_port,
            9000: server.openai_port,
        }
        self._appended = {  # to scripts that would look for a server at the usual port, or start one
            "chat": f"--server 127.0.0.1:{server.grpc_port}",
            "demo": f"--server 127.0.0.1:{server.grpc_port}",
            "trace": f"--server 127.0.0.1:{server.openai_port}",
            "rolling-restart": f"decode --run-dir {server.run_dir}",  # of several servers, one of its workers
            "doctor": f"--no-measuring --ports {_free_port()}",
        }
        outside = {
            name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
        }  # of `make test`
        self._environment = {**outside, "BATON_PYTHON": sys.executable, "COLUMNS": "120"}
        for path in ROOT.iterdir():
            if not path.name.startswith("."):
                (clone / path.name).symlink_to(path)

    def follow(self, block: Block) -> None:
        if block.above in ELSEWHERE:
            return
        if block.language == "yaml":
            self._write(block)
        elif block.language == "python":
            assert self._run([sys.executable, "-c", self._here(block.text)]).strip()
        elif block.language == "sh":
            for command in commands(block.text):
                self.do(command)
        else:
            assert not re.search(r"^(\$ |scripts/|make |curl )", block.text, re.MULTILINE), (
                "a command in a block that is not run"
            )

    def do(self, command: str) -> None:
        if command in NOT_RUN or command in self._done:
            return
        self._done.add(command)
        if command.startswith("make "):
            for line in self._run(["make", "-n", *command.split()[1:]]).splitlines():
                self.do(line)
            return
        script = re.match(r"scripts/([\w-]+)", command)
        if script and script[1] in OPTIONS_ONLY:
            self._read_options(script[1], shlex.split(command)[1:])
            return
        more = self._appended.get(script[1], "") if script and "--server" not in command else ""
        told = self._shell(f"{self._here(command)} {more}")
        assert told.strip() or command == "scripts/rolling-restart", command
        assert '"error"' not in told, told

    def _write(self, block: Block) -> None:
        """A whole deployment under the name that the line above gives it, or a part of one."""
        named = re.fullmatch(r"Save this as `([\w.]+)`:", block.above)
        path = self.clone / (named[1] if named else "part.yaml")
        part = {"workers": [{"role": "aggregated"}], **yaml.safe_load(block.text)}
        path.write_text(block.text if named else yaml.safe_dump(part))
        load_deployment(path)

    def _read_options(self, script: str, arguments: list[str]) -> None:
        parsed = importlib.import_module(f"scripts.{script}").parse_options(arguments)
        if getattr(parsed, "config", None):
            load_deployment(self.clone / parsed.config)
        if hasattr(parsed, "scenario"):
            read_options(parsed)
        for side in filter(None, (getattr(parsed, name, None) for name in ("first", "second"))):
            name, _, target = side.partition("=")
            assert name
            assert "://" in target or load_deployment(self.clone / target)

    def _here(self, text: str) -> str:
        """Addresses of the pages are the server's."""
        return re.sub(r"127\.0\.0\.1:(8000|8001|8002|9000)\b", lambda found: f"127.0.0.1:{self._ports[int(found[1])]}", text)

    def _shell(self, command: str) -> str:
        arguments = ["bash", "-c", f"set -o pipefail; {command}"]
        end = time.monotonic() + METRICS_S
        while "| grep" in command and time.monotonic() < end:
            if self._execute(arguments).returncode == 0:
                break
            time.sleep(0.1)
        return self._run(arguments)

    def _run(self, arguments: list[str]) -> str:
        done = self._execute(arguments)
        assert done.returncode == 0, f"{arguments[-1]}\n{done.stdout}{done.stderr}"
        return done.stdout

    def _execute(self, arguments: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            arguments, input=TYPED, capture_output=True, text=True, timeout=120, env=self._environment, cwd=self.clone
        )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def done() -> set[str]:
    return set()


@pytest.fixture
def reader(real_server: TritonServer, tmp_path: Path, done: set[str]) -> Reader:
    assert shutil.which("curl"), "the tests need curl"
    return Reader(real_server, tmp_path, done)


@pytest.mark.parametrize("page", PAGES)
def test_commands_of(page: str, reader: Reader) -> None:
    for block in blocks(page):
        reader.follow(block)


def test_nothing_is_left_out_without_need() -> None:
    """Every entry of the tables is needed by some page, and what they name is there."""
    found = [block for page in PAGES for block in blocks(page)]
    assert {block.above for block in found} >= set(ELSEWHERE)
    shell = "\n".join(block.text for block in found if block.language == "sh")
    assert all(f"scripts/{name}" in shell for name in OPTIONS_ONLY)
    for test in OPTIONS_ONLY.values():
        path, name = test.split("::")
        assert f"def {name}(" in (ROOT / path).read_text(), test
    for path in re.findall(r"tests/[\w/]+\.py", " ".join(ELSEWHERE.values())):
        assert (ROOT / path).exists()


def test_pages_link_to_what_is_there() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text()
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("script", OPTIONS_ONLY)
def test_scripts_whose_options_are_only_read_explain_themselves(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"scripts.{script}").parse_options(["--help"])
    assert f"usage: scripts/{script}" in capsys.readouterr().out
