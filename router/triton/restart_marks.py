"""Which workers a router of this server was restarting when it died: drained or unloaded, and nobody would end that.

A mark is an empty file in the run directory, named after the worker. The next router of the server looks for them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from python_backends.core.types import Epoch, WorkerId
from router.seams import Destination

log = logging.getLogger(__name__)

_PREFIX = "restarting-"
_NO_LIFE = Epoch(0)


class RestartMarks:
    """Any number of threads may use it."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    @contextmanager
    def mark(self, worker: Destination) -> Iterator[None]:
        """For as long as the block lasts."""
        path = self._run_dir / f"{_PREFIX}{worker.worker}"
        try:
            path.touch()
        except OSError as error:  # a full disk, say; that is no reason not to restart it
            log.warning("should this router die now, worker %s stays as it is: %s", worker.worker, error)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def left(self) -> list[Destination]:
        """Workers that are marked. Their names say where they are (python_backends/core/place.py)."""
        workers = [WorkerId(path.name.removeprefix(_PREFIX)) for path in sorted(self._run_dir.glob(f"{_PREFIX}*"))]
        return [Destination(worker, *worker.partition("@")[::2], _NO_LIFE) for worker in workers]
