"""Shutting down hub_cards/serve.py, its API key and its metrics."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve import ServeArguments, load, make_app
from serve_requests import Limits
from serve_shutdown import Server
from serving import serving, wait_until

from training.data.cards import Cards


NAME = "hub_cards/tiny-qgsa"
CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 3}


@pytest.fixture(scope="module")
def checkpoint():
    return load(NAME)


# Shutting down


@contextmanager
def closing_server(checkpoint, seconds):
    """A server, its URL and its thread; its model is held until `go` is set."""
    gate = make_app(*checkpoint, Limits(max_batch_size=1))
    batches, go = gate.answerer.batches, threading.Event()
    run = batches.run
    batches.run = lambda jobs: go.wait(20) and run(jobs)
    server = Server(gate, seconds, port=0, log_level="critical")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield server, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", thread, go
    finally:
        go.set()
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive() and not batches.thread.is_alive()


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_taken_is_answered_and_the_rest_refused(stream, checkpoint):
    with closing_server(checkpoint, 20) as (server, url, thread, go), ThreadPoolExecutor(2) as threads:
        body = {**HELLO, "stream": stream}
        taken = [threads.submit(httpx.post, url + CHAT, json=body, timeout=20) for _ in "ab"]  # one runs, one waits
        wait_until(lambda: len(server.gate.answerer.batches.open) == 2)
        server.handle_exit(signal.SIGTERM, None)
        time.sleep(0.3)  # some ticks
        health = httpx.get(f"{url}/health")
        assert health.status_code == 503 and health.json() == {"status": "shutting down"}
        refused = httpx.post(url + CHAT, json=HELLO)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "shutting_down"
        assert httpx.get(f"{url}/metrics").status_code == 200
        go.set()
        for each in taken:
            response = each.result()
            assert response.status_code == 200 and ("[DONE]" in response.text) == stream
        thread.join(5)
        assert not thread.is_alive()


@pytest.mark.parametrize("stream", [False, True])
def test_what_takes_too_long_gets_an_error(stream, checkpoint):
    with closing_server(checkpoint, 0.5) as (server, url, thread, _), ThreadPoolExecutor(1) as threads:
        taken = threads.submit(httpx.post, url + CHAT, json={**HELLO, "stream": stream}, timeout=20)
        wait_until(lambda: server.gate.answerer.batches.open)
        server.handle_exit(signal.SIGTERM, None)
        began = time.monotonic()
        response = taken.result()
        assert 0.4 < time.monotonic() - began < 3
        assert response.status_code == 503 and response.json()["error"]["code"] == "shutting_down"


def test_a_stream_that_takes_too_long_ends_with_an_error(checkpoint):
    model, processor = load(NAME)
    model.generation_config.eos_token_id = None
    steps, go = [], threading.Event()

    def stop(*_):
        steps.append(1)
        if len(steps) == 4:
            go.wait(20)

    model.model.text_model.register_forward_pre_hook(stop)
    with closing_server((model, processor), 0.5) as (server, url, _, started):
        started.set()
        with httpx.stream(
            "POST", url + CHAT, json={**HELLO, "max_tokens": 99, "stream": True}, timeout=20
        ) as response:
            wait_until(lambda: len(steps) == 4)
            server.handle_exit(signal.SIGTERM, None)
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        go.set()
    assert json.loads(lines[0])["choices"] and "[DONE]" not in lines
    assert json.loads(lines[-1])["error"]["code"] == "shutting_down"


def test_a_second_signal_ends_it_at_once(checkpoint):
    with closing_server(checkpoint, 20) as (server, url, thread, _), ThreadPoolExecutor(1) as threads:
        taken = threads.submit(httpx.post, url + CHAT, json=HELLO, timeout=20)
        wait_until(lambda: server.gate.answerer.batches.open)
        server.handle_exit(signal.SIGTERM, None)
        time.sleep(0.3)
        assert server.gate.running == 1 and not server.should_exit
        server.handle_exit(signal.SIGTERM, None)
        assert taken.result(5).status_code == 503


@contextmanager
def script(*options, **environment):
    """The script and its URL."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "hub_cards/serve.py", "--port", "0", *options]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=root, env={**os.environ, **environment}, **pipes) as process:
        try:
            yield process, next(re.findall(r"http://\S+", line)[0] for line in process.stderr if "running on" in line)
        finally:
            process.kill()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_the_script_ends_on_a_signal(sign):
    """Its key comes from the environment, which its workers do not inherit."""
    with script(QGSA_API_KEY="a-secret") as (process, url):
        assert httpx.post(url + CHAT, json=HELLO).status_code == 401
        authorized = {"authorization": "Bearer a-secret"}
        assert httpx.post(url + CHAT, json=HELLO, headers=authorized, timeout=60).status_code == 200
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert workers
        assert not [each for each in workers if b"a-secret" in Path(f"/proc/{each}/environ").read_bytes()]
        process.send_signal(sign)
        assert process.wait(10) == 0
        assert "Traceback" not in process.stderr.read()


# The key


@pytest.fixture(scope="module")
def locked(checkpoint):
    with serving(make_app(*checkpoint, Limits(), api_key="s3cret")) as url:
        yield url


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "s3cret",
        "Bearer",
        "Bearer s3cre",
        "Bearer s3crets",
        "Bearer S3CRET",
        "Basic s3cret",
        "Bearer \xff",
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/metrics"])
def test_without_the_key_nothing_is_answered(header, path, locked):
    headers = [] if header is None else [(b"authorization", header.encode("latin-1"))]
    method, body = ("POST", HELLO) if path == CHAT else ("GET", None)
    response = httpx.request(method, locked + path, json=body, headers=headers)
    assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and error["code"] == "invalid_api_key"
    assert "s3cret" not in response.text


def test_the_key_opens_all_and_health_needs_none(locked):
    client = openai.OpenAI(base_url=f"{locked}/v1", api_key="s3cret", max_retries=0)
    assert client.chat.completions.create(model=NAME, **HELLO).choices[0].message.content
    assert [model.id for model in client.models.list()] == [NAME]
    assert httpx.get(f"{locked}/metrics", headers={"authorization": "bearer s3cret"}).status_code == 200
    assert httpx.get(f"{locked}/health").status_code == 200
    with pytest.raises(openai.AuthenticationError, match="API key"):
        openai.OpenAI(base_url=f"{locked}/v1", api_key="guess", max_retries=0).models.list()


def test_a_wrong_key_is_refused_before_the_body_is_read(locked):
    """A body that would be refused as well."""
    response = httpx.post(locked + CHAT, content=b" " * 21_000_000, headers={"content-type": "text/plain"})
    assert response.status_code == 401


@pytest.mark.parametrize("key", ["", "two words", "ümlaut", "line\n"])
def test_keys_that_no_header_can_hold(key):
    with pytest.raises(ValueError, match="api_key must be printable ASCII") as raised:
        ServeArguments(api_key=key)
    assert not key or key not in str(raised.value)


def test_the_key_of_the_environment_is_taken_out_of_it(monkeypatch):
    monkeypatch.setenv("QGSA_API_KEY", "abc")
    run = ServeArguments()
    assert run.api_key == "abc" and "QGSA_API_KEY" not in os.environ and "abc" not in repr(run)
    monkeypatch.setenv("QGSA_API_KEY", "abc")
    assert ServeArguments(api_key="given").api_key == "given" and "QGSA_API_KEY" not in os.environ
    assert ServeArguments().api_key is None


# Metrics


def read_metrics(url):
    """Samples by name and labels."""
    text = httpx.get(f"{url}/metrics").text
    families = text_string_to_metric_families(text)
    return {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}


def test_metrics_count_what_was_done(checkpoint):
    with serving(make_app(*checkpoint, Limits())) as url:
        content_type = httpx.get(f"{url}/metrics").headers["content-type"]
        assert content_type.startswith("text/plain; version=") and read_metrics(url)["qgsa_batch_size_count",] == 0
        import base64
        import io

        sample, data = Cards("test", 40)[0], io.BytesIO()
        sample["image"].save(data, "PNG")
        image = {"url": f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"}
        content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": sample["question"]}]
        answer = httpx.post(url + CHAT, json={"messages": [{"role": "user", "content": content}]}, timeout=60).json()
        httpx.post(url + CHAT, json=HELLO, timeout=60)
        for _ in range(3):
            httpx.post(url + CHAT, json={"messages": []})
        httpx.get(f"{url}/health")
        found = read_metrics(url)
    assert found["qgsa_requests_total", "200"] == 2 and found["qgsa_requests_total", "400"] == 3
    assert sum(value for name, value in found.items() if name[0] == "qgsa_requests_total") == 5
    assert found["qgsa_tiles_encoded_total",] == sum(answer["qgsa"]["tiles"]) > 0
    assert found["qgsa_visual_tokens_kept_total",] == sum(answer["qgsa"]["visual_tokens"])
    assert (found["qgsa_tiles_dense_total",], found["qgsa_visual_tokens_dense_total",]) == (16, 272)
    assert found["qgsa_completion_tokens_total",] == answer["usage"]["completion_tokens"] + 3
    assert found["qgsa_batch_size_count",] == found["qgsa_batch_size_sum",] == 2
    seconds = {
        part: found["qgsa_request_seconds_sum", part]
        for part in ("receiving", "reading", "waiting", "first_token", "whole")
    }
    assert all(found["qgsa_request_seconds_count", part] == 2 for part in seconds)
    assert 0 < seconds["reading"] < seconds["whole"] and 0 < seconds["first_token"] < seconds["whole"]
    assert all(value >= 0 for value in seconds.values())
    assert sum(seconds.values()) <= 2 * seconds["whole"] and found["qgsa_requests_waiting",] == 0


def test_metrics_and_health_are_answered_while_the_queue_is_full(checkpoint):
    gate = make_app(*checkpoint, Limits(max_batch_size=1, max_waiting=2))
    batches, go = gate.answerer.batches, threading.Event()
    run = batches.run
    batches.run = lambda jobs: go.wait(20) and run(jobs)
    with serving(gate) as url, ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(httpx.post, url + CHAT, json=HELLO, timeout=20) for _ in range(3)]
        wait_until(lambda: batches.waiting == 2 and len(batches.open) == 3)
        assert httpx.post(url + CHAT, json=HELLO).status_code == 503
        found = read_metrics(url)
        assert found["qgsa_requests_waiting",] == 2 and found["qgsa_requests_total", "503"] == 1
        go.set()
        assert [each.result().status_code for each in asked] == [200] * 3
