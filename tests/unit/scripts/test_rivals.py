"""Rivals: what is started how, and that a server stands still unless it is measured. None of them is installed here."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import yaml

from loadtest.options import Options
from loadtest.protocols import connect
from python_backends.core.config import load_deployment
from python_backends.core.errors import ConfigError, Unavailable
from python_backends.core.paths import repository_root
from scripts import rivals
from scripts.benchmarks.mixed import sides
from scripts.rivalry.engine import ENGINES, RivalEngine
from scripts.rivalry.environments import ENVIRONMENTS
from scripts.rivalry.servers import RIVALS, Rival, RivalServer, Served, find_rival

_SERVER = """
import sys, time
from tests.unit.loadtest.openai_server import openai_server
with openai_server(int(sys.argv[1])):
    time.sleep(120)
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"max_position_embeddings": 4096}')
    return directory


def _rival(program: str) -> Rival:
    return Rival(
        "little",
        "a server of words",
        "none",
        lambda served: [sys.executable, "-c", program, str(served.port)],
        lambda served: {"PYTHONPATH": str(repository_root()), "CORES": str(served.cores)},
    )


@pytest.fixture
def server(model: Path, tmp_path: Path) -> Iterator[RivalServer]:
    made = RivalServer(_rival(_SERVER), model, tmp_path / "little.log")
    yield made
    made.stop()


def _await_stop(process: psutil.Process) -> None:
    """The signal is sent; the process stops when the kernel looks at it next."""
    end = time.monotonic() + 10
    while process.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_server_stands_still_unless_it_is_measured(server: RivalServer) -> None:
    server.start()
    assert server._process is not None
    process = psutil.Process(server._process.pid)
    for _ in range(2):
        _await_stop(process)
        with server.awake() as address:
            assert process.status() != psutil.STATUS_STOPPED
            connection = connect(address, server.rival.options(Options()))
            connection.wait_ready(5)
            assert len(list(connection.prepare([1, 2, 3], 4).parts())) == 4
            connection.close()
    server.stop()
    assert not process.is_running()
    assert "-c" in server.description
    assert "CORES=(" in server.description


def test_a_server_that_ends_says_its_last_words(model: Path, tmp_path: Path) -> None:
    made = RivalServer(_rival("raise SystemExit('no such model')"), model, tmp_path / "little.log")
    with pytest.raises(Unavailable, match=r"little has ended: .*\nno such model"):
        made.start()


_ENGINE = """
from scripts.rivalry.engines.calls import answer_calls, private_stdout
class Engine:
    def generate(self, prompts, steps):
        print("a library that talks")
        if steps > 100:
            raise SystemExit("too many")
        return len(prompts[0]) / 1000, [len(prompts)] * steps
answers = private_stdout()
answer_calls(Engine(), answers)
"""


def test_an_engine_stands_still_except_while_it_computes(tmp_path: Path) -> None:
    with closing(RivalEngine("little", [sys.executable, "-c", _ENGINE], tmp_path / "log")) as engine:
        process = psutil.Process(engine._process.pid)
        for _ in range(2):
            _await_stop(process)
            assert engine.generate([[1, 2, 3], [4, 5, 6]], 2) == (0.003, [2, 2])
        with pytest.raises(Unavailable, match=r"(?s)little has ended: .*too many"):
            engine.generate([[1]], 101)
    assert not process.is_running()


def test_an_engine_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="little has ended: no such model"):
        RivalEngine("little", [sys.executable, "-c", "raise SystemExit('no such model')"], tmp_path / "log")


def test_vllm_is_not_a_false_rival(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """float32 and not its 16 bits, threads on cores of their own, every token told."""
    _pretend_installed("vllm")
    served = Served(model, 8100, (0, 1))
    small, default = (RIVALS[name].command(served) for name in ("vllm", "vllm-default"))
    assert small[:4] == [str(tmp_path / "cache/rivals/vllm/bin/vllm"), "serve", str(model), "--dtype"]
    assert " ".join(small).endswith("--max-num-batched-tokens 256 --max-num-seqs 64")
    assert "--max-model-len 4096" in " ".join(small)
    assert "float32" in default
    assert "--max-num-batched-tokens" not in default
    other = find_rival("vllm:512")
    assert other is not None
    assert "512" in other.command(served)
    assert other.variables(served)["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"
    asked = other.options(Options(fields='{"top_p": 0.5}'))
    assert asked.api == "completions"
    assert asked.extra_fields["top_p"] == 0.5
    assert asked.extra_fields["stream_options"]["continuous_usage_stats"]


def test_vllms_engine_runs_as_its_server_does(model: Path) -> None:
    _pretend_installed("vllm")
    command = " ".join(ENGINES["vllm"](model, 1))
    core = min(os.sched_getaffinity(0))
    assert f" VLLM_CPU_OMP_THREADS_BIND={core} " in command
    assert command.endswith(f"bin/python -m scripts.rivalry.engines.vllm {model} 4096")


def test_vllms_disaggregated_mode_has_a_core_for_each_instance(model: Path) -> None:
    _pretend_installed("vllm")
    rival = RIVALS["vllm-disaggregated"]
    parts = rival.command(Served(model, 8100, (0, 1)))
    ports = parts[parts.index("--ports") + 1].split(",")
    assert (ports[0], len(set(ports))) == ("8100", 5)
    command = " ".join(parts)
    assert "bin/python -m scripts.rivalry.vllm_pair " in command
    assert "--cores 0,1 --transfer " in command
    assert command.endswith(f"bin/vllm serve {model} --dtype float32 --max-model-len 4096")
    assert '"kv_connector": "NixlConnector"' in command
    with pytest.raises(ConfigError, match="need a core each"):
        rival.command(Served(model, 8100, (0,)))


def _pretend_installed(name: str) -> None:
    environment = ENVIRONMENTS[name]
    environment.directory.mkdir(parents=True)
    (environment.directory / "baton-installed").write_text("\n".join(environment.packages))


def test_what_is_not_installed_is_told_with_the_command(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run: scripts/rivals install vllm"):
        RivalServer(RIVALS["vllm"], model, tmp_path / "log")


def test_rivals_are_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    _pretend_installed("vllm")
    assert rivals.main([]) == 0
    shown = capsys.readouterr().out
    for name in (*ENVIRONMENTS, *RIVALS, "yes", "cache/rivals/NAME"):
        assert name in shown


def test_versions_are_pinned() -> None:
    for environment in ENVIRONMENTS.values():
        assert all("==" in requirement for requirement in environment.packages)


def test_all_deployments_of_the_mixed_load_get_the_model(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "one.yaml"
    config.write_text("workers: [{role: prefill}, {role: decode}]\nrouter: {slo: {itl_ms: 100}}\n")
    found = sides(config, model, ["aggregated", f"own={config}", "vllm", "tuned=vllm:512"], tmp_path / "out")
    names = [text.partition("=")[0] for text in found]
    assert names == ["baton", "aggregated", "own", "vllm", "tuned"]
    for text in found[:3]:
        assert load_deployment(Path(text.partition("=")[2])).model.path == str(model)
    assert yaml.safe_load((tmp_path / "out" / "baton.yaml").read_text())["router"] == {"slo": {"itl_ms": 100}}
    local = sides(config, None, ["always-local"], tmp_path / "local")[1].partition("=")[2]
    mode = load_deployment(Path(local)).router
    assert (mode.mode, mode.slo.itl_ms) == ("always-local", 100)
    assert sides(config, None, [], tmp_path / "other") == [f"baton={config}"]
    with pytest.raises(ConfigError, match="'nobody' is neither"):
        sides(config, model, ["nobody"], tmp_path)
