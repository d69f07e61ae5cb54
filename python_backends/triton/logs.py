"""Python's logging into Triton's log."""

from __future__ import annotations

import logging

import triton_python_backend_utils as pb_utils


class _TritonHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        message = self.format(record)
        if record.levelno >= logging.ERROR:
            pb_utils.Logger.log_error(message)
        elif record.levelno >= logging.WARNING:
            pb_utils.Logger.log_warn(message)
        else:
            pb_utils.Logger.log_info(message)


def log_to_triton() -> None:
    """Route the root logger to Triton's log, from INFO up. Called once per model process."""
    root = logging.getLogger()
    root.handlers = [_TritonHandler()]
    root.setLevel(logging.INFO)
