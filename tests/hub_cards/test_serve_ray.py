"""Many replicas behind Ray Serve: answers, errors, and requests whose replica is killed or removed."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families


pytest.importorskip("ray.serve", reason="needs Ray Serve: make ray")

import serve
import serve_ray
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from serve_errors import RequestError
from serve_load import LoadArguments, make_bodies
from serve_ray_load import LOOPBACK, ask_all, replica_pids, started_fleet
from serving import serving


NAME = "hub_cards/tiny-qgsa"
CHAT = "/v1/chat/completions"
KEY = {"authorization": "Bearer s3cret"}
HELLO = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 3}


@pytest.fixture(scope="module")
def bodies():
    """Questions about cards; every other one as a stream."""
    found = [json.loads(body) for body in make_bodies(LoadArguments())]
    return [json.dumps(body | {"stream": number % 2 == 0}).encode() for number, body in enumerate(found)]


# The door


class Replicas:
    """Replicas in this process: each answer is a list of ASGI messages, and an error ends it."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), 0
        self.answer = self  # `replicas.answer.remote(...)`

    def remote(self, scope, body):
        self.asked += 1
        return Answer(self.answers.pop(0))


class Answer:
    def __init__(self, messages):
        self.messages = messages

    def cancel(self):
        pass

    async def __aiter__(self):
        for message in self.messages:
            if isinstance(message, Exception):
                raise message
            yield message


def begin(kind):
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}


def piece(body, more=False):
    return {"type": "http.response.body", "body": body, "more_body": more}


def passed(*answers):
    """What the door sends, and how many replicas it asked."""
    replicas, sent = Replicas(*answers), []
    door = SimpleNamespace(replicas=replicas, asked_again=SimpleNamespace(inc=lambda number: None))

    async def send(message):
        sent.append(message)

    try:
        asyncio.run(serve_ray.Passage(door, {}, b"{}")({}, None, send))
    except RequestError as error:
        return error, replicas.asked
    return b"".join(message.get("body", b"") for message in sent), replicas.asked


DIED = ActorDiedError()
WHOLE = [begin(b"application/json"), piece(b"whole")]


@pytest.mark.parametrize("lost", [[DIED], [begin(b"application/json"), DIED]])
def test_another_replica_is_asked_until_an_answer_begins(lost):
    assert passed(lost, WHOLE) == (b"whole", 2)


def test_a_request_brings_down_no_more_than_two_replicas():
    error, asked = passed([DIED], [DIED], WHOLE)
    assert (error.status, error.code, asked) == (503, "replica_lost", 2)


def test_a_stream_that_has_begun_ends_with_an_error():
    body, asked = passed([begin(b"text/event-stream"), piece(b"data: 1\n\n", True), DIED], WHOLE)
    first, last = body.decode().strip().split("\n\n")
    assert asked == 1 and first == "data: 1"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"


def test_a_replica_may_die_once_all_is_said():
    assert passed([*WHOLE, DIED]) == (b"whole", 1)


@pytest.mark.parametrize(
    "refusal, code",
    [
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), "overloaded"),
        (DeploymentUnavailableError(None), "shutting_down"),
    ],
)
def test_what_no_replica_takes_is_refused(refusal, code):
    error, asked = passed([refusal])
    assert (error.status, error.code, asked) == (503, code, 1)


def test_an_answer_without_any_message_is_an_error():
    error, asked = passed([])
    assert (error.status, asked) == (500, 1)
    assert passed([])[0] is not error, "an error keeps the tracebacks of all requests that it is raised for"


def test_a_replica_keeps_its_tuning(tmp_path):
    saved = tmp_path / "tuning.json"
    serve_ray.Replica({"model": NAME, "tuning": str(saved)}).gate.answerer.close()
    assert json.loads(saved.read_text())["seconds_per_tile_and_layer"]


def test_a_replica_that_tells_nothing_counts_for_a_minute(monkeypatch):
    """Serve replaces it meanwhile, and the others answer."""
    told = [["here", "here", ValueError()], TimeoutError(), TimeoutError(), DeploymentUnavailableError(None)]

    class Broadcast:
        async def results_async(self, **_):
            if isinstance(told[0], list):
                return told.pop(0)
            raise told.pop(0)

    replicas = SimpleNamespace(options=lambda **_: SimpleNamespace(broadcast=lambda method: Broadcast()))
    door, now = serve_ray.Door.__mro__[1](replicas, 10, 1000, None), 100.0
    monkeypatch.setattr(serve_ray.time, "monotonic", lambda: now)
    for seconds, healthy in ((2, 2), (2, 2), (60, 0), (2, 0)):
        now += seconds
        response = asyncio.run(door.health(None))
        assert (response.status_code, door.healthy) == (200 if healthy else 503, healthy)


@pytest.mark.parametrize(
    "args, message",
    [
        ({"max_replica": 2}, "unknown option max_replica"),
        ({"host": "0.0.0.0"}, "unknown option host"),
        ({"min_replicas": 0}, r"min_replicas \(0\) must be at least 1"),
        ({"min_replicas": 3, "max_replicas": "2"}, r"max_replicas \(2\) must be at least min_replicas \(3\)"),
        ({"max_batch_size": "0"}, r"max_batch_size \(0\) must be at least 1"),
        ({"api_key": "two words"}, "api_key must be printable ASCII"),
    ],
)
def test_options_are_checked(args, message):
    with pytest.raises(ValueError, match=message):
        serve_ray.app(args)


def test_a_second_build_finds_the_key_of_the_environment(monkeypatch):
    """It would serve without one otherwise."""
    monkeypatch.setenv("QGSA_API_KEY", "abc")
    for _ in range(2):
        serve_ray.app({})
        assert os.environ["QGSA_API_KEY"] == "abc"


# The application, on loopback


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    log = tmp_path_factory.mktemp("fleet") / "ray.log"
    args = {"model": NAME, "num_cpus": 0.5, "max_waiting": 16}
    with started_fleet(log, 2, args, QGSA_API_KEY="s3cret", OMP_NUM_THREADS="1") as fleet:
        yield fleet


@pytest.fixture(scope="module")
def alone():
    """The server of `serve.py`."""
    with serving(serve.make_app(*serve.load(NAME), serve.Limits(), api_key="s3cret")) as url:
        yield url


def post(url, body, **options):
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    headers = {"content-type": "application/json", **KEY, **options.pop("headers", {})}
    return httpx.post(url + CHAT, content=body, headers=headers, timeout=120, **options)


def shown(response):
    """An answer without names, times and seconds."""
    fields = response.json()
    return response.status_code, fields["choices"], fields["usage"], {**fields["qgsa"], "seconds": 0}


def test_answers_are_those_of_one_server(fleet, alone, bodies):
    for body in bodies[1:8:2]:
        assert shown(post(fleet.url, body)) == shown(post(alone, body))


def test_streams_come_whole(fleet, alone, bodies):
    client = openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="s3cret", max_retries=0)
    chunks = list(client.chat.completions.create(model=NAME, **json.loads(bodies[0])))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    whole = post(alone, json.loads(bodies[0]) | {"stream": False}).json()["choices"][0]["message"]["content"]
    assert len(chunks) > 1 and text == whole and chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "method, path, body, headers",
    [
        ("POST", CHAT, HELLO, {"authorization": "Bearer guess"}),
        ("GET", "/v1/models", None, {"authorization": ""}),
        ("GET", "/metrics", None, {"authorization": "Basic s3cret"}),
        ("POST", CHAT, {**HELLO, "model": "another"}, KEY),
        ("POST", CHAT, {**HELLO, "max_tokens": 1000}, KEY),
        ("POST", CHAT, {"messages": []}, KEY),
        ("POST", CHAT, HELLO, {**KEY, "content-type": "text/plain"}),
        ("POST", CHAT, {"messages": "a" * 21_000_000}, KEY),
        ("GET", CHAT, None, KEY),
        ("GET", "/v1/nothing", None, KEY),
    ],
)
def test_errors_are_those_of_one_server(method, path, body, headers, fleet, alone):
    content = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", **headers}
    found, expected = (
        httpx.request(method, url + path, content=content, headers=headers, timeout=60) for url in (fleet.url, alone)
    )
    assert expected.status_code >= 400
    assert (found.status_code, found.json()) == (expected.status_code, expected.json())
    assert found.headers.get("www-authenticate") == expected.headers.get("www-authenticate")


def test_health_needs_no_key(fleet):
    response = httpx.get(f"{fleet.url}/health", timeout=60)
    assert response.status_code == 200 and response.json() == {"status": "ok", "replicas": 2}


def read_metrics(fleet):
    text = httpx.get(f"{fleet.url}/metrics", headers=KEY, timeout=60).text
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def test_metrics_have_the_numbers_of_all_replicas(fleet, bodies):
    assert {each.kind for each in asyncio.run(ask_all(fleet.url, bodies, 8, 16, headers=KEY))} == {"answered"}
    samples = read_metrics(fleet)
    answered = {each.labels["replica"]: each.value for each in samples if each.name == "qgsa_batch_size_sum"}
    assert len(answered) == 2 and min(answered.values()) > 0
    door = {each.labels["status"]: each.value for each in samples if each.name == "qgsa_door_requests_total"}
    assert sum(answered.values()) == door["200"] and door["401"] >= 1


def test_a_client_that_leaves_stops_its_answer(fleet):
    """Both replicas would be busy for long otherwise."""
    body = {**HELLO, "max_tokens": 512, "temperature": 2, "stream": True}
    waiting = "qgsa_requests_waiting"
    for _ in range(4):
        with httpx.stream("POST", fleet.url + CHAT, json=body, headers=KEY, timeout=60) as response:
            next(response.iter_lines())
    began = time.monotonic()
    assert post(fleet.url, HELLO).status_code == 200 and time.monotonic() - began < 60
    assert not any(each.value for each in read_metrics(fleet) if each.name == waiting)


def test_every_request_has_an_outcome_when_a_replica_is_killed(fleet, bodies):
    before = replica_pids(fleet.ray.pid)
    victim = before[0]
    workers = Path(f"/proc/{victim}/task/{victim}/children").read_text().split()

    def kill(count):
        if count == 12:
            os.kill(victim, signal.SIGKILL)

    found = asyncio.run(ask_all(fleet.url, bodies, 12, 60, kill, KEY))
    assert len(found) == 60 and {each.status for each in found} <= {200, 503}
    kinds = [each.kind for each in found]
    assert "lost" not in kinds and kinds.count("answered") >= 45, kinds
    fleet.wait_for(2)
    after = replica_pids(fleet.ray.pid)
    assert len(after) == 2 and victim not in after and set(before) & set(after)
    assert not [each for each in workers if Path(f"/proc/{each}/cmdline").exists()]
    assert {each.kind for each in asyncio.run(ask_all(fleet.url, bodies, 4, 8, headers=KEY))} == {"answered"}


def test_requests_that_were_taken_are_answered_at_the_end(fleet):
    """Ends the application: no test may follow."""
    body = {**HELLO, "max_tokens": 200, "temperature": 2, "stream": True}
    lines, begun = [], threading.Event()

    def read():
        with httpx.stream("POST", fleet.url + CHAT, json=body, headers=KEY, timeout=120) as response:
            for line in filter(None, response.iter_lines()):
                lines.append(line)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(60)
    end = [sys.executable, serve_ray.__file__]
    environment = {**os.environ, **LOOPBACK, "RAY_ADDRESS": fleet.run.args[fleet.run.args.index("--address") + 1]}
    ended = subprocess.run(end, env=environment, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr[-2000:]
    reader.join(5)
    assert lines[-1] == "data: [DONE]" and len(lines) > 2
    with pytest.raises(httpx.TransportError):
        httpx.get(fleet.url + "/health")
