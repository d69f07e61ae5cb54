"""What Locust loads: `LOCUST_SKIP_MONKEY_PATCH=1 locust -f loadtest/locustfile.py --host grpc://127.0.0.1:8001`.

scripts/loadtest does it all in one go: a server if none is given, the run, the report.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from typing import Any

import gevent
from gevent import monkey
from locust import LoadTestShape, User, events
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

from loadtest.live import Live
from loadtest.options import add_options, read_options
from loadtest.run import LoadTest
from loadtest.users import ArrivalUser, LoadUser, StreamUser
from python_backends.core.errors import BatonError

if monkey.is_module_patched("threading"):
    sys.exit("error: gevent has patched the standard library; set LOCUST_SKIP_MONKEY_PATCH=1 (loadtest/run.py says why)")

_SPAWN_RATE = 100.0
_COMMAND = os.environ.get("BATON_COMMAND", "")  # of the script that started this, and that makes the report


class _Current:
    """The test that is set up or runs; Locust's page may run several, one after another."""

    test: LoadTest | None = None
    live: gevent.Greenlet | None = None


class PlannedShape(LoadTestShape):
    """As many users as the plan's streams at this moment, and the one for its arrivals."""

    def tick(self) -> tuple[int, float, list[type[User]] | None] | None:
        environment = self.runner.environment if self.runner is not None else None
        test = _Current.test or _set_up(environment)
        if test is None or (_Current.live is not None and test.now_s >= test.plan.duration_s):
            return None
        level = test.plan.shape.level(test.now_s if _Current.live is not None else 0.0)
        streams = math.ceil(test.plan.streams.count * level) if test.plan.streams else 0
        classes: list[type[User]] = [StreamUser] if streams else []
        if test.plan.arrivals is not None:
            classes.append(ArrivalUser)
        return streams + (ArrivalUser in classes), _SPAWN_RATE, classes


@events.init_command_line_parser.add_listener
def _on_parser(parser: LocustArgumentParser, **_: Any) -> None:
    add_options(parser)


@events.init.add_listener
def _on_init(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    if options is not None and options.headless and _set_up(environment) is None:
        sys.exit(1)


@events.test_start.add_listener
def _on_start(environment: Environment, **_: Any) -> None:
    if _Current.test is None:
        return
    environment.stop_timeout = _Current.test.options.drain
    LoadUser.test, LoadUser.live = _Current.test, Live(_Current.test, environment)
    _Current.test.begin()
    _Current.live = gevent.spawn(LoadUser.live.run)


@events.test_stop.add_listener
def _on_stop(**_: Any) -> None:
    if _Current.test is None or _Current.live is None:
        return
    _Current.live.kill()
    LoadUser.live.close()
    directory = _Current.test.finish(_COMMAND or shlex.join(["locust", *sys.argv[1:]]))
    if not _COMMAND:
        print(f"The files are there; for the report: python -m loadtest.report {directory}", flush=True)
    _Current.test, _Current.live = None, None


def _set_up(environment: Environment | None) -> LoadTest | None:
    """None when there is nothing to run; the reason has been said then."""
    if environment is None or environment.parsed_options is None:
        return None
    try:
        _Current.test = LoadTest(environment.host or "", read_options(environment.parsed_options))
    except BatonError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return _Current.test
