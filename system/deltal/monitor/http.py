"""Metrics, status and the live page over HTTP: bound to loopback, or behind a token.

Without a token only loopback is served, and only to requests that name a loopback host: a web page the user happens
to visit cannot read a run through a DNS name of its own. With a token every path asks for it.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import json
import math
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest

from deltal.errors import ConfigError, DeadlineError
from deltal.monitor.page import PAGE, SECURITY_HEADERS

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
START_DEADLINE = 10.0
"""Seconds `serve_app` waits for its server."""
Headers = Mapping[str, str]


def is_loopback(host: str) -> bool:
    """Whether `host` (a name or an address) is this machine and reachable from it alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def require_safe(host: str, protected: bool) -> None:
    """Raises ConfigError when `host` is open to others and nothing asks for a token."""
    if not is_loopback(host) and not protected:
        raise ConfigError(f"monitor.host = {host!r} is open to other machines: set DELTAL_TOKEN, or use 127.0.0.1")


def refusal(headers: Headers, token: str | None) -> tuple[int, str] | None:
    """Status and line with which a request must be refused; None when it may pass. Looks at headers only."""
    if token:
        # Compared as bytes, as they came: both servers read headers as latin-1.
        given = headers.get("authorization", "").encode("latin-1", errors="replace")
        if hmac.compare_digest(given, f"Bearer {token}".encode(errors="replace")):
            return None
        return 401, "this needs the header Authorization: Bearer DELTAL_TOKEN\n"
    host = headers.get("host", "")
    name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
    return None if is_loopback(name) else (403, f"unknown host {name!r}: use 127.0.0.1 or localhost\n")


class MetricsServer:
    """A server of one registry's /metrics. `port` is the one it got; `close()` ends it."""

    def __init__(self, server: socketserver.ThreadingTCPServer) -> None:
        self._server = server
        self.port: int = server.socket.getsockname()[1]
        self._thread = threading.Thread(
            target=server.serve_forever, args=(0.05,), name=f"metrics-{self.port}", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops listening; returns when the port is free again. May be called twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)


def serve_metrics(
    registry: CollectorRegistry, *, host: str = "127.0.0.1", port: int = 0, token: str | None = None
) -> MetricsServer:
    """Serves `registry` at /metrics from daemon threads. Port 0: any free one.

    Raises ConfigError when `host` is not loopback and there is no token, or when the port cannot be had.
    """
    require_safe(host, bool(token))

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # seconds: a client that connects and says nothing must not hold a thread for ever

        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, body = refusal(headers, token) or (200, "")
            if status == 200 and self.path.partition("?")[0] != "/metrics":
                status, body = 404, "only /metrics is served here\n"
            data = generate_latest(registry) if status == 200 else body.encode()
            with contextlib.suppress(ConnectionError):  # the client went away, which is no news
                self.send_response(status)
                self.send_header("Content-Type", EXPOSITION if status == 200 else "text/plain; charset=utf-8")
                self.send_header("Content-Length", str(len(data)))
                if status == 401:
                    self.send_header("WWW-Authenticate", "Bearer")
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing: one scrape every few seconds would fill the actor's log."""

    # Not http.server's own class: that one looks its name up in DNS, which can take seconds.
    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    try:
        return MetricsServer(Server((host, port), Handler))
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def live_app(
    *,
    status: Callable[[], dict[str, Any]],
    targets: Callable[[], list[dict[str, Any]]],
    registry: CollectorRegistry,
    token: str | None,
) -> Starlette:
    """The Controller's pages: `/` (live page), `/status.json`, `/sd`, `/metrics`.

    `status` and `targets` (the latter in the form of Prometheus' HTTP service discovery) are called once a request,
    in a thread, so they may block; when one raises, the answer is 503 and the server lives on.
    """
    # Imported here: every actor imports this file for serve_metrics, only the Controller needs a web framework.
    from starlette.applications import Starlette
    from starlette.responses import HTMLResponse, PlainTextResponse
    from starlette.responses import Response as PlainResponse
    from starlette.routing import Route

    def answer(request: Request) -> Response:
        path = request.url.path
        refused = refusal(request.headers, token)
        if refused is not None and path == "/" and refused[0] == 401:
            # The page itself holds no facts; a browser shows it and it asks for the token.
            return HTMLResponse(PAGE, 401, headers={**SECURITY_HEADERS, "WWW-Authenticate": "Bearer"})
        if refused is not None:
            extra = {"WWW-Authenticate": "Bearer"} if refused[0] == 401 else {}
            return PlainTextResponse(refused[1], refused[0], headers={**SECURITY_HEADERS, **extra})
        if path == "/":
            return HTMLResponse(PAGE, headers=SECURITY_HEADERS)
        if path == "/metrics":
            return PlainResponse(generate_latest(registry), headers={**SECURITY_HEADERS, "Content-Type": EXPOSITION})
        try:
            facts = json.dumps(plain(status() if path == "/status.json" else targets()))
        except Exception as error:  # the run is in trouble; the page must be able to say so
            return PlainTextResponse(f"{type(error).__name__}\n", 503, headers=SECURITY_HEADERS)
        return PlainResponse(facts, headers=SECURITY_HEADERS, media_type="application/json")

    app = Starlette(routes=[Route(path, answer) for path in ("/", "/status.json", "/sd", "/metrics")])
    app.state.protected = bool(token)
    return app


def plain(value: Any) -> Any:
    """`value` as JSON can say it: NaN and infinity become None, numpy scalars numbers, the unknown its str."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "item") and callable(value.item):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | bool | int) else str(value)


class AppServer:
    """A running app. `port` is the one it got; `close()` ends it within about 5 seconds."""

    def __init__(self, port: int, stop: Callable[[], None]) -> None:
        self.port = port
        self._stop = stop

    def close(self) -> None:
        """Stops listening. May be called twice."""
        self._stop()


def serve_app(app: Starlette, *, host: str, port: int) -> AppServer:
    """Serves `app` from a daemon thread with an event loop of its own; it answers when this returns. Port 0: any.

    Raises ConfigError when `host` is not loopback and the app asks for no token, or when the port cannot be had;
    DeadlineError when the server has not started within 10 s.
    """
    import uvicorn

    require_safe(host, bool(getattr(app.state, "protected", False)))
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", server_header=False, timeout_graceful_shutdown=2
        )
    )
    # A new thread has no event loop; uvicorn makes one and touches no signal handler outside the main thread.
    thread = threading.Thread(target=server.run, args=([listener],), name="live-page", daemon=True)
    thread.start()

    def stop() -> None:
        server.should_exit = True
        thread.join(5.0)
        listener.close()

    deadline = time.monotonic() + START_DEADLINE
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            stop()
            raise DeadlineError(f"the live page on {host}:{port} did not start within {START_DEADLINE:.0f} s")
        time.sleep(0.01)
    return AppServer(listener.getsockname()[1], stop)
