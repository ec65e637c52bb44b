"""Laws of the servers: real HTTP on loopback; nothing is open to others without a token; hostile text stays text."""

import base64
import hashlib
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from deltal.errors import ConfigError
from deltal.monitor.http import live_app, plain, serve_app, serve_metrics
from deltal.monitor.metrics import ControllerMetrics, RolloutMetrics

TOKEN = "s3cret-é"
HOSTILE = "<script>alert(1)</script>"
TARGETS = [{"targets": ["127.0.0.1:4711"], "labels": {"role": "rollout"}}]
Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a live page; gives its address and ends it after the test."""
    servers = []

    def start(status: Callable[[], dict[str, Any]] = dict, token: str | None = None) -> str:
        registry = ControllerMetrics("night", "controller").registry
        app = live_app(status=status, targets=lambda: TARGETS, registry=registry, token=token)
        servers.append(serve_app(app, host="127.0.0.1", port=0))
        return f"http://127.0.0.1:{servers[-1].port}"

    yield start
    for server in servers:
        server.close()


def bearer(token: str) -> dict[bytes, bytes]:
    return {b"Authorization": f"Bearer {token}".encode()}


def test_metrics_are_served_and_the_port_is_free_after_close() -> None:
    metrics = RolloutMetrics("night", "rollout-0")
    metrics.tokens.inc(7)
    server = serve_metrics(metrics.registry)
    url = f"http://127.0.0.1:{server.port}"
    answer = httpx.get(url + "/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'deltal_rollout_tokens_total{actor="rollout-0",role="rollout",run="night"} 7.0' in answer.text
    assert httpx.get(url + "/other").status_code == 404
    server.close()
    server.close()
    serve_metrics(metrics.registry, port=server.port).close()


def test_metrics_behind_a_token_need_it_in_the_header() -> None:
    server = serve_metrics(RolloutMetrics("night", "rollout-0").registry, token="s3cret")
    url = f"http://127.0.0.1:{server.port}/metrics"
    try:
        assert httpx.get(url).status_code == 401
        assert httpx.get(url + "?token=s3cret").status_code == 401
        assert httpx.get(url, headers=bearer("s3cres")).status_code == 401
        assert httpx.get(url, headers=bearer("s3cret")).status_code == 200
    finally:
        server.close()


def test_a_silent_client_holds_up_no_other() -> None:
    server = serve_metrics(RolloutMetrics("night", "rollout-0").registry)
    with socket.create_connection(("127.0.0.1", server.port)):
        assert httpx.get(f"http://127.0.0.1:{server.port}/metrics", timeout=5).status_code == 200
    server.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_no_server_is_open_to_others_without_a_token(host: str) -> None:
    registry = ControllerMetrics("night", "controller").registry
    with pytest.raises(ConfigError, match="set DELTAL_TOKEN"):
        serve_metrics(registry, host=host)
    app = live_app(status=dict, targets=list, registry=registry, token=None)
    with pytest.raises(ConfigError, match="set DELTAL_TOKEN"):
        serve_app(app, host=host, port=0)


def test_with_a_token_other_hosts_are_allowed() -> None:
    registry = ControllerMetrics("night", "controller").registry
    server = serve_metrics(registry, host="0.0.0.0", token="s3cret")
    server.close()
    app = live_app(status=dict, targets=list, registry=registry, token="s3cret")
    serve_app(app, host="0.0.0.0", port=0).close()


def test_a_taken_port_is_a_named_error() -> None:
    registry = ControllerMetrics("night", "controller").registry
    app = live_app(status=dict, targets=list, registry=registry, token=None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            serve_metrics(registry, port=port)
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            serve_app(app, host="127.0.0.1", port=port)


def test_the_app_answers_when_serve_app_returns_and_not_after_close() -> None:
    registry = ControllerMetrics("night", "controller").registry
    server = serve_app(live_app(status=dict, targets=list, registry=registry, token=None), host="127.0.0.1", port=0)
    url = f"http://127.0.0.1:{server.port}/status.json"
    assert httpx.get(url).json() == {}
    started = time.monotonic()
    server.close()
    assert time.monotonic() - started < 5
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


@pytest.mark.parametrize("path", ["/", "/status.json", "/sd", "/metrics"])
def test_every_path_of_the_live_page_asks_for_the_token(serve: Serve, path: str) -> None:
    url = serve(lambda: {"name": "night"}, TOKEN)
    assert httpx.get(url + path).status_code == 401
    assert httpx.get(url + path, params={"token": TOKEN}).status_code == 401
    assert httpx.get(url + path, headers=bearer("wrong")).status_code == 401
    assert "night" not in httpx.get(url + path).text
    assert httpx.get(url + path, headers=bearer(TOKEN)).status_code == 200


@pytest.mark.parametrize("path", ["/", "/status.json", "/sd", "/metrics"])
def test_without_a_token_only_requests_that_name_loopback_pass(serve: Serve, path: str) -> None:
    url = serve()
    assert httpx.get(url + path, headers={"Host": "evil.example:80"}).status_code == 403
    assert httpx.get(url + path, headers={"Host": "localhost:80"}).status_code == 200
    assert httpx.get(url + path, headers={"Host": "[::1]:80"}).status_code == 200


def test_the_page_is_self_contained_and_writes_text_only(serve: Serve) -> None:
    answer = httpx.get(serve(lambda: {"name": HOSTILE}) + "/")
    assert HOSTILE not in answer.text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", answer.text)
    assert not re.search(r"https?://|//[a-z]+\.", answer.text)
    assert not re.search(r"\son[a-z]+=|\sstyle=", answer.text)


def test_the_security_policy_allows_exactly_the_page_s_own_script_and_style(serve: Serve) -> None:
    answer = httpx.get(serve() + "/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_service_discovery_has_prometheus_form(serve: Serve) -> None:
    answer = httpx.get(serve() + "/sd")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == TARGETS


def test_a_status_that_fails_is_503_and_the_server_lives_on(serve: Serve) -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("secret detail")

    url = serve(broken)
    answer = httpx.get(url + "/status.json")
    assert answer.status_code == 503
    assert "secret" not in answer.text
    assert httpx.get(url + "/sd").status_code == 200


def test_numbers_json_cannot_say_become_null(serve: Serve) -> None:
    np = pytest.importorskip("numpy")
    facts = {"reward": float("nan"), "loss": float("inf"), "accuracy": np.float32(0.5), "step": np.int64(3), 1: (2,)}
    expected = {"reward": None, "loss": None, "accuracy": 0.5, "step": 3, "1": [2]}
    assert httpx.get(serve(lambda: facts) + "/status.json").json() == expected
    assert plain({"when": time}) == {"when": str(time)}
