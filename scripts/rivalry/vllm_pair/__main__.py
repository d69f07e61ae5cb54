"""Starts two vLLM instances, each on half of the cores, and the proxy before them. All are of one process group.

    python -m scripts.rivalry.vllm_pair --ports 8100,8101,8102,8103,8104 --cores 0,1 --transfer JSON -- vllm serve MODEL ...

The command is that of both instances; ports, cores and their --kv-transfer-config are added to it. Ends when one of them does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import sys
from dataclasses import dataclass

import aiohttp
from aiohttp import web

from scripts.rivalry.vllm_pair.proxy import Proxy
from scripts.rivalry.vllm_pair.threads import bind, calm

_HOST = "127.0.0.1"
_POLL_S = 0.5
_HEALTH_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Instance:
    """One vLLM server of the two."""

    name: str
    port: int
    cores: frozenset[int]
    process: asyncio.subprocess.Process

    @property
    def address(self) -> str:
        return f"http://{_HOST}:{self.port}"


async def start(name: str, command: list[str], ports: list[int], cores: list[int], transfer: dict[str, str]) -> Instance:
    """It takes a while until it answers. `ports`: of its API, and of NIXL's handshakes."""
    port, handshakes = ports
    variables = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NIXL_SIDE_CHANNEL_HOST": _HOST,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(handshakes),
    }
    whole = [*command, "--host", _HOST, "--port", str(port), "--kv-transfer-config", json.dumps(transfer)]
    print(f"{name}:", shlex.join([*(f"{variable}={value}" for variable, value in variables.items()), *whole]), flush=True)
    process = await asyncio.create_subprocess_exec(*whole, env={**os.environ, **variables})
    return Instance(name, port, frozenset(cores), process)


async def run(ports: list[int], cores: list[int], transfer: dict[str, str], command: list[str]) -> str:
    """Serve until an instance ends. Returns which it was."""
    half = len(cores) // 2
    instances = [
        await start("prefill", command, ports[1:3], cores[:half], {**transfer, "kv_role": "kv_producer"}),
        await start("decode", command, ports[3:5], cores[half:], {**transfer, "kv_role": "kv_consumer"}),
    ]
    ends = [asyncio.create_task(instance.process.wait(), name=instance.name) for instance in instances]
    serving = asyncio.create_task(_serve(ports[0], instances), name="proxy")
    done, _ = await asyncio.wait([*ends, serving], return_when=asyncio.FIRST_COMPLETED)
    first = done.pop()
    return f"{first.get_name()} ended: {first.exception() or first.result()}"


async def _serve(port: int, instances: list[Instance]) -> None:
    """Answer as soon as both instances do."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_HEALTH_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        proxy = Proxy(session, *(instance.address for instance in instances))
        while not await proxy.healthy():
            await asyncio.sleep(_POLL_S)
        for instance in instances:
            moved = bind(instance.process.pid, instance.cores)
            calmed = calm(instance.process.pid)
            print(f"{instance.name}: {moved} threads moved to its cores, {calmed} that spin calmed", flush=True)
        # A client that goes away ends its request at the instance, too.
        runner = web.AppRunner(proxy.application(), handler_cancellation=True, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, _HOST, port).start()
        await asyncio.Event().wait()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.rivalry.vllm_pair", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ports", type=_numbers, required=True, help="five: the proxy's, prefill's two and decode's two")
    parser.add_argument("--cores", type=_numbers, required=True, help="two or more; the first half is for prefill")
    parser.add_argument("--transfer", type=json.loads, required=True, help="their --kv-transfer-config, without roles")
    parser.add_argument("command", nargs="+")
    parsed = parser.parse_args(arguments)
    print(asyncio.run(run(parsed.ports, parsed.cores, parsed.transfer, parsed.command)), file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
