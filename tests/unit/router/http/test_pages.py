"""The page's files: whole, of their type, never from elsewhere, and only those."""

from __future__ import annotations

import asyncio
import re
from http import HTTPStatus

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from router.http.pages import Pages


def _get(name: str | None, **headers: str) -> Response:
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "headers": [(key.replace("_", "-").encode(), value.encode()) for key, value in headers.items()],
        "path_params": {"name": name},
    }
    pages = Pages()
    return asyncio.run(pages.index(Request(scope)) if name is None else pages.file(Request(scope)))


def test_every_file_that_is_named_is_there() -> None:
    pending, seen = ["index.html"], set()
    while pending:
        name = pending.pop()
        seen.add(name)
        text = bytes(_get(name).body).decode()
        named = re.findall(r'(?:src|href)="page/([^"]+)"|from "\./([^"]+)"', text)
        pending += [first or second for first, second in named if (first or second) not in seen]
    assert {"style.css", "main.js", "flow.js", "icon.svg"} <= seen


@pytest.mark.parametrize(("name", "kind"), [(None, "text/html"), ("main.js", "text/javascript"), ("style.css", "text/css")])
def test_types_and_what_browsers_are_told(name: str | None, kind: str) -> None:
    response = _get(name)
    assert response.headers["content-type"].startswith(kind)
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "http" not in response.headers["content-security-policy"]
    again = _get(name, if_none_match=response.headers["etag"])
    assert again.status_code == HTTPStatus.NOT_MODIFIED
    assert again.body == b""


@pytest.mark.parametrize("name", ["", "..", "../app.py", "__init__.py", "nothing.js"])
def test_nothing_else_is_served(name: str) -> None:
    with pytest.raises(HTTPException):
        _get(name)


def test_no_file_names_another_host() -> None:
    for name in ("index.html", "main.js", "flow.js", "chat.js", "compare.js", "pools.js", "cache.js", "dom.js", "api.js"):
        urls = re.findall(r"https?://[^\"' )]+", bytes(_get(name).body).decode())
        assert set(urls) <= {"http://www.w3.org/2000/svg"}, name
