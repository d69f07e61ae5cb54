from __future__ import annotations

import pytest

from python_backends.core.errors import QueueFull, Unavailable
from router.http.errors import api_error


@pytest.mark.parametrize(("hint", "told"), [(None, "1"), (0.1, "1"), (2.3, "3")])
def test_clients_are_told_when_to_come_back(hint: float | None, told: str) -> None:
    assert api_error(QueueFull("full", hint)).headers == {"Retry-After": told}
    assert api_error(Unavailable("no worker is up", hint)).headers == {"Retry-After": told}
