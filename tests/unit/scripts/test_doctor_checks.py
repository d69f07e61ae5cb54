"""What the doctor says of good and of broken conditions: the level, what is wrong, and how to mend it."""

from __future__ import annotations

import pytest
from packaging.specifiers import SpecifierSet

from scripts.doctor_checks import (
    GIB,
    Finding,
    Gpu,
    Level,
    Nic,
    check_arithmetic,
    check_cores,
    check_gpus,
    check_libraries,
    check_memory,
    check_model,
    check_nics,
    check_numa,
    check_open_files,
    check_ports,
    check_processor,
    check_python,
    check_redis,
    check_shared_memory,
    check_tritonserver,
    check_versions,
    memory_needed,
)

MIB = 1 << 20


def _one(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def _is(finding: Finding, level: Level, *said: str) -> None:
    assert finding.level is level, finding
    for text in said:
        assert text in finding.text, finding


def test_python() -> None:
    for minor in (10, 11, 12):
        _is(check_python((3, minor)), Level.OK)
    for version in ((3, 9), (3, 13), (2, 7)):
        _is(check_python(version), Level.BROKEN, "3.10 to 3.12", "scripts/install with PYTHON")


def test_libraries() -> None:
    wanted = {"torch": SpecifierSet("==2.13.0"), "numpy": SpecifierSet("==1.26.4"), "nvidia-pytriton": SpecifierSet("==0.7.0")}
    good = {"torch": "2.13.0+cpu", "numpy": "1.26.4", "nvidia-pytriton": "0.7.0"}
    _is(_one(check_libraries(wanted, good)), Level.OK, "3 as pinned")
    missing, other = check_libraries(wanted, {"torch": "2.12.0", "nvidia-pytriton": "0.7.0"})
    _is(missing, Level.BROKEN, "numpy missing", "run scripts/install")
    _is(other, Level.WARNING, "torch 2.12.0 instead of 2.13.0")
    without = {name: version for name, version in good.items() if name != "nvidia-pytriton"}
    _is(_one(check_libraries(wanted, without, {"nvidia-pytriton"})), Level.OK)
    _is(_one(check_libraries(wanted, without)), Level.BROKEN, "nvidia-pytriton")


def test_tritonserver_and_libpython() -> None:
    _is(check_tritonserver("/opt/tritonserver/bin/tritonserver", ""), Level.OK, "/opt")
    missing = check_tritonserver("", "no tritonserver on PATH and no nvidia-pytriton package; run scripts/install")
    _is(missing, Level.BROKEN, "run scripts/install")
    assert missing.subject == "tritonserver"
    library = check_tritonserver(
        "", "Triton's Python backend needs libpython3.11.so.1.0; install it (apt install libpython3.11)"
    )
    assert (library.subject, library.level) == ("libpython", Level.BROKEN)


def test_ports() -> None:
    _is(_one(check_ports({"--http-port": (8000, ""), "--grpc-port": (8001, "")})), Level.OK, "8000, 8001 free")
    taken = _one(check_ports({"--http-port": (8000, "Address already in use by nginx (process 7)"), "--grpc-port": (8001, "")}))
    _is(taken, Level.BROKEN, "port 8000", "nginx (process 7)", "give another with --http-port")


def test_shared_memory() -> None:
    _is(check_shared_memory(1 << 30, 4), Level.OK, "1024 MiB")
    _is(check_shared_memory(32 * MIB, 4), Level.WARNING, "--shm-size")
    _is(check_shared_memory(8 * MIB, 4), Level.BROKEN, "8 MiB free, 4 models need 16", "remount")


def test_memory() -> None:
    needed = memory_needed(weights=500 * MIB, pools=[512 * MIB] * 3)
    assert 3 * GIB < needed < 4 * GIB
    _is(check_memory(16 * GIB, None, needed), Level.OK)
    _is(check_memory(4 * GIB, None, needed), Level.WARNING, "lower engine.kv_pool_mib")
    _is(check_memory(2 * GIB, None, needed), Level.BROKEN, "2.0 GiB available", "needs about 3.6", "a smaller model")
    inside = check_memory(64 * GIB, 1 * GIB, needed)
    _is(inside, Level.BROKEN, "1.0 GiB available inside the container's limit", "raise the container's limit")
    _is(check_memory(16 * GIB, 32 * GIB, needed), Level.OK, "16.0 GiB available,")


def test_processor() -> None:
    _is(check_processor({"sse4_2"}, "Old", "x86_64"), Level.WARNING, "no AVX2")
    _is(check_processor({"avx2"}, "Usual", "x86_64"), Level.OK, "no bfloat16", "float32")
    modern = check_processor({"avx2", "avx512f", "amx_bf16"}, "New", "x86_64")
    _is(modern, Level.OK, "avx512f, amx_bf16")
    assert "no bfloat16" not in modern.text
    _is(check_processor(set(), "Neoverse", "aarch64"), Level.NOTE, "aarch64")


def test_cores_and_numa() -> None:
    _is(check_cores(4, None, {"prefill": 2, "decode": 2}), Level.OK, "prefill 2, decode 2")
    _is(check_cores(2, None, {"prefill": 2, "decode": 2}), Level.WARNING, "lower workers[].threads")
    _is(check_cores(8, 1.5, {"prefill": 2, "decode": 2}), Level.WARNING, "may use 1.5 cores", "raise the limit")
    assert check_numa(1, False) == check_numa(2, True) == []
    _is(_one(check_numa(2, False)), Level.WARNING, "workers[].cpus")


def test_open_files_and_model() -> None:
    assert check_open_files(1 << 20) == []
    _is(_one(check_open_files(256)), Level.WARNING, "ulimit -n")
    _is(check_model("/models/x", ""), Level.OK, "/models/x")
    _is(check_model("x", "model.path: 'x' is not a directory"), Level.BROKEN, "not a directory")


def test_arithmetic() -> None:
    assert check_arithmetic("float32", {"torch", "fake"}) == check_arithmetic("bfloat16", {"trtllm"}) == []
    _is(_one(check_arithmetic("float32", {"trtllm"})), Level.WARNING, "model.dtype", "bfloat16")


def test_gpus() -> None:
    two = [Gpu("H100", 80 * GIB), Gpu("H100", 80 * GIB)]
    both = {(0, 1), (1, 0)}
    _is(_one(check_gpus([], set(), {"decode": "cpu"}, False)), Level.NOTE, "none")
    gpus, peers = check_gpus(two, both, {"prefill": "cuda:0", "decode": "cuda:1"}, True)
    _is(gpus, Level.OK, "H100 (80 GiB), H100 (80 GiB)")
    _is(peers, Level.OK, "between all GPUs")
    _is(check_gpus(two, {(0, 1)}, {}, True)[1], Level.WARNING, "1->0", "host memory")
    assert len(check_gpus(two[:1], set(), {"decode": "cuda"}, True)) == 1
    _is(check_gpus([], set(), {"decode": "cuda"}, False)[0], Level.BROKEN, "worker decode wants cuda, torch sees none")
    _is(check_gpus(two, both, {"decode": "cuda:2"}, True)[0], Level.BROKEN, "cuda:2", "only 2")
    _is(check_gpus([], set(), {"decode": "cpu"}, True)[0], Level.WARNING, "NVIDIA driver", "a CPU build")


def test_network() -> None:
    _is(_one(check_nics([], [])), Level.NOTE, "loopback")
    _is(_one(check_nics([Nic("eth0", 0, 1500)], [])), Level.OK, "eth0 of unknown speed, MTU 1500")
    slow = check_nics([Nic("eth0", 1000, 1500)], [])
    _is(slow[1], Level.NOTE, "keep prefill and decode of a model on one host")
    fast = check_nics([Nic("eth0", 1000, 1500), Nic("ib0", 100_000, 4092)], ["mlx5_0 port 1: 100 Gb/sec (4X EDR)"])
    _is(fast[0], Level.OK, "ib0 100 Gbit/s")
    _is(fast[1], Level.OK, "mlx5_0")


def test_redis() -> None:
    url = "redis://10.0.0.1:6379/0"
    _is(check_redis(url, "", 0.21, "allkeys-lru"), Level.OK, "0.21 ms")
    _is(check_redis(url, "Connection refused", 0, ""), Level.BROKEN, url, "Connection refused", "store.remote.servers")
    _is(check_redis(url, "", 0.2, "noeviction"), Level.WARNING, "maxmemory-policy allkeys-lru")


@pytest.mark.parametrize("name", ["ticket", "layout", "model"])
def test_versions_that_kv_depends_on(name: str) -> None:
    ours = {"ticket": "1", "layout": "1", "model": "ab", "torch": "2.13.0"}
    _is(_one(check_versions(ours, dict(ours), "host-b")), Level.OK, "host-b has the same")
    _is(_one(check_versions(ours, {**ours, name: "2"}, "host-b")), Level.BROKEN, f"{name} is", "KV can't be exchanged")


def test_versions_that_had_better_be_the_same() -> None:
    ours = {"ticket": "1", "torch": "2.13.0", "numpy": "1.26.4"}
    _is(
        _one(check_versions(ours, {"ticket": "1", "torch": "2.12.0"}, "host-b")),
        Level.WARNING,
        "numpy is 1.26.4 here and missing there; torch is 2.13.0 here and 2.12.0 there",
    )
