"""Faulty clients of hub_cards/serve_faults.py: what the valid ones get meanwhile."""

import asyncio
import json

import pytest
import serve_faults
from serve_faults import FAULTS, FaultsArguments, format_faults, measure_all, mixed_bodies, under, until
from serve_processes import Running
from serving import serving


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    output = tmp_path_factory.mktemp("faults")
    options = {"fault_seconds": 1, "mixed_seconds": 1, "clients": 2, "max_new_tokens": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve_faults, "SECONDS_TO_SETTLE", 0)
        run = FaultsArguments(**options, vllm_python=str(output / "python"), output_dir=str(output))
        return list(measure_all(run))


def test_no_valid_request_is_lost(rows):
    faults = [*FAULTS, "mixed load"]
    assert [row["fault"] for row in rows] == [*faults, "mixed load"]
    for row in rows[: len(faults)]:
        assert row["server"] == "serve.py" and row["answered"] > 0
        assert (row["lost"], row["refused"], row["tracebacks"], row["health_failed"]) == (0, 0, 0, 0), row
        assert 0 < row["memory_before_bytes"] <= row["memory_peak_bytes"] < 2 * row["memory_before_bytes"]
        clients, _ = FAULTS.get(row["fault"], (0, None))
        assert (row["faulty_connections"] > 0) == (clients > 0)


def test_a_server_that_is_not_installed_says_so(rows):
    assert rows[-1]["server"] == "vllm" and rows[-1]["skipped"].endswith("is missing): make vllm")
    head, rule, *lines = format_faults(rows).splitlines()
    assert {line.count("|") for line in (head, rule, *lines)} == {17} and len(lines) == len(rows)
    assert lines[1].startswith("| serve.py | clients that vanish | ") and "| skipped: vLLM " in lines[-1]


@pytest.mark.parametrize("fault", [name for name, (clients, _) in FAULTS.items() if clients])
def test_a_server_that_takes_no_connection_stops_no_faulty_client(fault, monkeypatch):
    """As one does whose queue of connections is full."""
    tries, (_, once) = 0, FAULTS[fault]

    async def refuse(*_, **__):
        nonlocal tries
        tries += 1
        raise ConnectionRefusedError

    async def attack_for_a_while():
        attack = serve_faults.Attack("http://127.0.0.1:1", b"{}")
        async with asyncio.timeout(0.8):
            await attack.keep_on(1, lambda number: once(attack, number))

    monkeypatch.setattr(serve_faults, "GARBAGE_BYTES", 1000)
    monkeypatch.setattr(asyncio, "open_connection", refuse)
    with pytest.raises(TimeoutError):
        asyncio.run(attack_for_a_while())
    assert tries > 1


def test_lost_requests_and_bad_health_are_counted(tmp_path):
    """By turns an answer, an error in OpenAI's format, and half an answer; /health is not healthy."""
    count = 0

    async def app(scope, receive, send):
        nonlocal count
        found = [(200, b'{"choices": []}'), (503, b'{"error": {"message": "full"}}'), (200, b"data: half\n\n")]
        status, body = (404, b"") if scope["path"] == "/health" else found[count % 3]
        count += scope["path"] != "/health"
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})

    with serving(app, lifespan="off") as url:
        row = asyncio.run(under(Running(url, 0, tmp_path), [b"{}"], 1, 0.5, "clients that vanish"))
    assert min(row["answered"], row["refused"], row["lost"]) > 0  # the faulty clients take turns, too
    assert row["health_failed"] > 0 and row["faulty_connections"] > 0
    assert row["errors"] == ["200: data: half", '503: {"error": {"message": "full"}}']


def test_the_mixed_load_has_all_kinds_of_requests():
    bodies = [json.loads(body) for body in mixed_bodies(FaultsArguments())]
    images = [
        [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
        for body in bodies
    ]
    assert list(map(len, images[:6])) == [0, 1, 2, 1, 1, 1]
    assert [body.get("stream", False) for body in bodies[:6]] == [False, False, False, True, False, False]
    assert images[4] == images[5] and bodies[4] != bodies[5]


def test_requests_end_with_the_time():
    assert list(until(0)) == []
    assert next(until(1)) == 0


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"faults": ["fire"]}, r"faults \(fire\): choose from none, clients that vanish"),
        ({"servers": ["apache"]}, r"servers \(apache\): choose from serve.py, vllm"),
        ({"clients": 0}, r"clients \(0\) must be at least 1"),
        ({"mixed_seconds": -1}, r"mixed_seconds \(-1\) must be at least 0"),
    ],
)
def test_arguments_out_of_range_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        FaultsArguments(**fields)
