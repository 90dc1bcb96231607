"""A console for tests: served by uvicorn on a real socket, over a real database."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from durable_cluster.ops.console.application import application
from durable_cluster.ops.console.settings import ConsoleSettings

OPERATOR_TOKEN = "operators-token-of-tests"
VIEWER_TOKEN = "viewers-token-of-tests"
UP_S_MAX = 20.0
CSRF = re.compile(r'name="csrf" value="([^"]+)"')


@contextmanager
def served(dsn: str, **settings: Any) -> Iterator[str]:
    """The address of a console that runs for as long: ``served(dsn, operator_token=…)``."""
    app = application(ConsoleSettings(dsn=dsn, **settings))
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_level="error", access_log=False, timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + UP_S_MAX
        while not server.started:
            assert thread.is_alive(), "the console did not start"
            assert time.monotonic() < deadline, "the console did not start in time"
            time.sleep(0.005)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(UP_S_MAX)
        assert not thread.is_alive()


def browser(url: str) -> httpx.Client:
    """One that keeps cookies and follows no redirect by itself."""
    return httpx.Client(base_url=url, timeout=20.0)


def program(url: str, token: str | None = OPERATOR_TOKEN) -> httpx.Client:
    """One that shows a token with each request."""
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    return httpx.Client(base_url=url, timeout=40.0, headers=headers)


def csrf_in(page: httpx.Response) -> str:
    """The token of the forms of a page."""
    found = CSRF.search(page.text)
    assert found, page.text
    return found[1]


@contextmanager
def logged_in(url: str, token: str = OPERATOR_TOKEN, **fields: str) -> Iterator[httpx.Client]:
    """A browser with a session."""
    with browser(url) as client:
        answer = client.post("/login", data={"csrf": csrf_in(client.get("/login")), "token": token, **fields})
        assert answer.status_code == 303, answer.text
        yield client
