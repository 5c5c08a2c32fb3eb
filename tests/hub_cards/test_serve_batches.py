"""Batches of hub_cards/serve.py: requests that wait together run together, and none suffers from another one."""

import base64
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import pytest
import torch
from serve import Limits, load, make_app
from serve_batches import Batches, Job, Rows, collate
from serve_errors import RequestError
from serve_requests import ChatRequest
from serving import serving, wait_until

from modeling_qgsa import GuidedVLM
from training.data.cards import Cards


NAME = "hub_cards/tiny-qgsa"
CARDS = Cards("test", 40)
LIMITS = Limits(max_batch_size=8, max_waiting=8)
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def checkpoint():
    return load(NAME)


@pytest.fixture(scope="module")
def served(checkpoint):
    """The application and its URL."""
    gate = make_app(*checkpoint, LIMITS)
    with serving(gate) as url:
        yield gate, url


@contextmanager
def held(gate, monkeypatch):
    """Holds the model behind its first batch until the block ends; yields the sizes of all batches."""
    batches, opened, sizes = gate.answerer.batches, threading.Event(), []
    run = batches.run

    def wait_and_run(jobs):
        sizes.append(len(jobs))
        assert opened.wait(20)
        run(jobs)

    monkeypatch.setattr(batches, "run", wait_and_run)
    try:
        yield sizes
    finally:
        opened.set()


def body_of(samples, question=None, **options):
    """A request about the images of some samples, and the question of the last one."""
    parts = [{"type": "image_url", "image_url": {"url": url_of(sample["image"])}} for sample in samples]
    text = {"type": "text", "text": question or samples[-1]["question"]}
    return {"messages": [{"role": "user", "content": [*parts, text]}], **options}


def url_of(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def ask(url, body):
    """Text, finish reason, usage and `qgsa` of an answer, streamed or not."""
    response = httpx.post(f"{url}{CHAT}", json=body, timeout=60)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        answer = response.json()
        choice = answer["choices"][0]
        return choice["message"]["content"], choice["finish_reason"], answer["usage"], without_seconds(answer["qgsa"])
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    *pieces, last, usage = map(json.loads, events)
    text = "".join(piece["choices"][0]["delta"]["content"] for piece in pieces)
    return text, last["choices"][0]["finish_reason"], usage["usage"], without_seconds(last["qgsa"])


def without_seconds(qgsa):
    return qgsa and {name: value for name, value in qgsa.items() if name != "seconds"}


def ask_together(served, monkeypatch, bodies):
    """Answers of requests that gather while the model is held by another one, and the sizes of their batches."""
    gate, url = served
    with ThreadPoolExecutor(len(bodies) + 1) as threads:
        with held(gate, monkeypatch) as sizes:
            first = threads.submit(ask, url, {"messages": [{"role": "user", "content": "hello there"}]})
            wait_until(lambda: sizes)
            asked = [threads.submit(ask, url, body) for body in bodies]
            wait_until(lambda: len(gate.answerer.batches.ready) == len(bodies))
        first.result()
        return [each.result() for each in asked], sorted(sizes[1:])


STREAM = {"stream": True, "stream_options": {"include_usage": True}}


def test_a_batch_answers_as_one_at_a_time(served, monkeypatch):
    """Images of several shapes and numbers, prompts and answers of several lengths, streams among them."""
    wide = {**CARDS[3], "image": CARDS[3]["image"].crop((0, 0, 256, 64))}
    bodies = [
        body_of([CARDS[0]]),
        body_of([CARDS[1]], max_tokens=1),
        body_of([wide], **STREAM),
        body_of([CARDS[2], CARDS[4]]),
        body_of([CARDS[5]], max_tokens=2, **STREAM),
        body_of([CARDS[6]], "what shape is on the red card? " * 5),
    ]
    alone = [ask(served[1], body) for body in bodies]
    together, sizes = ask_together(served, monkeypatch, bodies)
    assert sizes == [6] and together == alone
    assert alone[1][2]["completion_tokens"] == 1 and len({text for text, *_ in alone}) > 3
    assert together[3][3]["tiles_dense"] == [16, 16] and together[2][3]["tiles_dense"] == [4]


@pytest.mark.parametrize("qgsa", [{"selection": "dense"}, {"selection": "after_encoder"}, {"vision_budget": "FFCCCT"}])
def test_a_batch_of_other_budgets_answers_as_one_at_a_time(qgsa, served, monkeypatch):
    wide = {**CARDS[3], "image": CARDS[3]["image"].crop((0, 0, 256, 64))}
    bodies = [body_of([sample], qgsa=qgsa) for sample in (CARDS[0], wide, CARDS[2])]
    alone = [ask(served[1], body) for body in bodies]
    assert ask_together(served, monkeypatch, bodies) == (alone, [3])


def test_texts_without_images_share_a_batch(served, monkeypatch):
    bodies = [{"messages": [{"role": "user", "content": text}]} for text in ("hello there", "what?", "a b c d e")]
    alone = [ask(served[1], body) for body in bodies]
    assert ask_together(served, monkeypatch, bodies) == (alone, [3])


def test_requests_that_differ_in_budget_or_sampling_run_apart(served, monkeypatch):
    bodies = [
        body_of([CARDS[0]]),
        body_of([CARDS[1]], temperature=0, top_p=0.5, seed=3),  # greedy, whatever the others say
        body_of([CARDS[2]], qgsa={"max_tiles": 2}),
        body_of([CARDS[3]], qgsa={"max_tiles": 2, "selection": "before_encoder"}),  # the same, said differently
        body_of([CARDS[4]], temperature=1),
        body_of([CARDS[5]], temperature=1),
        body_of([CARDS[6]], temperature=1, top_p=0.5),
        {"messages": [{"role": "user", "content": "hello there"}]},
    ]
    assert ask_together(served, monkeypatch, bodies)[1] == [1, 1, 2, 2, 2]


def test_a_seed_repeats_an_answer_whoever_else_asks(served, monkeypatch):
    bodies = [body_of([CARDS[0]], temperature=2, seed=seed, max_tokens=8) for seed in (1, 2, 1)]
    others = [body_of([CARDS[0]], temperature=2, max_tokens=8) for _ in range(3)]
    alone = [ask(served[1], body)[0] for body in bodies]
    together, sizes = ask_together(served, monkeypatch, [*bodies, *others])
    assert [text for text, *_ in together[:3]] == alone and alone[0] == alone[2]
    assert sizes == [1, 1, 1, 3]


def test_a_short_answer_does_not_wait_for_a_long_one(checkpoint, monkeypatch):
    """The model stops in the middle of the batch: what is complete has been sent by then, and streams go on."""
    model, processor = load(NAME)
    model.generation_config.eos_token_id = None
    gate = make_app(model, processor, LIMITS)
    stopped, opened, steps = threading.Event(), threading.Event(), []

    def stop(*_):
        steps.append(1)
        if len(steps) == 10:
            stopped.set()
            assert opened.wait(20)

    with serving(gate) as url, ThreadPoolExecutor(4) as threads:
        try:
            with held(gate, monkeypatch) as sizes:
                threads.submit(ask, url, {**body_of([CARDS[0]]), "max_tokens": 1})
                wait_until(lambda: sizes)
                short = threads.submit(ask, url, body_of([CARDS[1]], max_tokens=2))
                long = threads.submit(ask, url, body_of([CARDS[2]], max_tokens=40))
                wait_until(lambda: len(gate.answerer.batches.ready) == 2)
                model.model.text_model.register_forward_pre_hook(stop)
            assert stopped.wait(20)
            text, reason, usage, _ = short.result(5)
            assert text and reason == "length" and usage["completion_tokens"] == 2 and not long.done()
        finally:
            opened.set()
        assert long.result()[2]["completion_tokens"] == 40 and sizes == [1, 2]
        assert len(steps) < 50  # and not up to the limit of the server


def test_an_end_that_the_checkpoint_sets_is_one_of_length(served, monkeypatch):
    monkeypatch.setattr(served[0].answerer.model.generation_config, "max_time", 1e-9)
    text, reason, usage, _ = ask(served[1], {"messages": [{"role": "user", "content": "hello there"}]})
    assert (reason, usage["completion_tokens"]) == ("length", 1)


def test_a_batch_that_fails_is_answered_one_by_one(served, monkeypatch):
    model, bodies = served[0].answerer.model.model, [body_of([CARDS[number]]) for number in range(3)]
    alone = [ask(served[1], body) for body in bodies]
    prefill = model.prefill

    def fail_on_several(request):
        if len(request.prompt.input_ids) > 1:
            raise MemoryError("a batch is too much")
        return prefill(request)

    monkeypatch.setattr(model, "prefill", fail_on_several)
    answers, sizes = ask_together(served, monkeypatch, bodies)
    assert answers == alone and sizes == [1, 1, 1, 3]


def test_only_the_request_that_fails_gets_the_error(served, monkeypatch):
    gate, url = served
    answerer, bad = gate.answerer, CARDS[1]["question"]
    describe = answerer.describe

    def fail(job, *rest):
        if bad in str(job.chat.messages):
            raise KeyError("a secret")
        return describe(job, *rest)

    monkeypatch.setattr(answerer, "describe", fail)
    expected = ask(url, body_of([CARDS[0]]))
    with ThreadPoolExecutor(3) as threads:
        with held(gate, monkeypatch) as sizes:
            threads.submit(ask, url, {"messages": [{"role": "user", "content": "hello there"}]})
            wait_until(lambda: sizes)
            good, failed = (threads.submit(httpx.post, url + CHAT, json=body_of([CARDS[n]])) for n in (0, 1))
            wait_until(lambda: len(answerer.batches.ready) == 2)
        assert good.result().json()["choices"][0]["message"]["content"] == expected[0]
        assert failed.result().status_code == 500 and "secret" not in failed.result().text


def test_a_pair_answers_one_at_a_time(checkpoint, monkeypatch):
    model, processor = checkpoint
    gate = make_app(model, processor, LIMITS, GuidedVLM(model, model, processor, max_tiles=2))
    bodies = [body_of([CARDS[number]]) for number in range(3)]
    with serving(gate) as url:
        alone = [ask(url, body) for body in bodies]
        assert ask_together((gate, url), monkeypatch, bodies) == (alone, [1, 1, 1])


# The queue alone


class Streamer:
    """Takes tokens, and the end."""

    def __init__(self):
        self.tokens, self.ended = [], 0
        self.tokenizer = SimpleNamespace(decode=lambda tokens, **_: "".join(chr(97 + token) for token in tokens))

    def put(self, tokens):
        self.tokens += tokens.tolist()

    def end(self):
        self.ended += 1


def job_of(group="a", images=0, **options):
    chat = ChatRequest(messages=[{"role": "user", "content": "hi"}], **options)
    job = Job(chat, [None] * images, Streamer(), group, time.perf_counter(), frozenset([9]))
    job.inputs, job.max_new_tokens = {"input_ids": torch.zeros(1, 3)}, 4
    return job


@contextmanager
def batches_of(size=3, most_images=4, places=20, read=lambda job: None):
    """Batches whose model is held until `go` is set; yields them, the batches that ran, and `go`."""
    ran, go = [], threading.Event()

    def run(jobs):
        ran.append(jobs)
        assert go.wait(10)
        for job in jobs:
            job.put(9)
            job.finish()

    batches = Batches(read, run, size, most_images, places)
    try:
        yield batches, ran, go
    finally:
        go.set()
        batches.close()
    assert not batches.thread.is_alive()


@pytest.mark.parametrize(
    "waiting, expected",
    [
        ("a0 a0 a0 a0", ["a0 a0 a0", "a0"]),
        ("a0 b0 a0 b0 a0", ["a0 a0 a0", "b0 b0"]),
        ("b0 a0 b0 a0", ["b0 b0", "a0 a0"]),
        ("a2 a1 a2 a1", ["a2 a1 a1", "a2"]),
        ("a3 a2", ["a3", "a2"]),
        ("a3 b3 a1", ["a3 a1", "b3"]),
        ("a9", ["a9"]),
    ],
)
def test_who_shares_a_batch(waiting, expected):
    """A letter per group, and the number of images: at most 3 jobs and 4 images, the first one whatever it has."""
    names = {}
    with batches_of() as (batches, ran, go):
        batches.add(job_of("first"))
        wait_until(lambda: ran)
        batches.most_images = 100  # all are read ahead
        for name in waiting.split():
            job = job_of(name[0], int(name[1]))
            names[job] = name
            batches.add(job)
            wait_until(lambda job=job: job in batches.ready)
        batches.most_images = 4
        go.set()
        for job in names:
            assert job.future.result(10).finish_reason == "stop"
        assert [" ".join(names[job] for job in batch) for batch in ran[1:]] == expected
        assert batches.ahead == 0 and batches.waiting == 0 and not batches.open


def test_few_images_are_read_ahead_of_the_model():
    read = []
    with batches_of(read=lambda job: read.append(job)) as (batches, ran, go):
        jobs = [job_of(images=2) for _ in range(6)]
        batches.add(jobs[0])
        wait_until(lambda: ran)
        for job in jobs[1:]:
            batches.add(job)
        wait_until(lambda: len(read) == 3)
        time.sleep(0.1)
        assert len(read) == 3 and batches.waiting == 5  # one runs, two with four images are ready
        go.set()
        assert all(job.future.result(10) for job in jobs) and batches.ahead == 0


def test_a_slow_image_holds_up_its_own_request_only():
    slow = threading.Event()
    with batches_of(read=lambda job: job.group != "slow" or slow.wait(10)) as (batches, _, go):
        go.set()
        one, other = job_of("slow", 1), job_of("fast", 1)
        batches.add(one)
        batches.add(other)
        assert other.future.result(5) and not one.future.done()
        slow.set()
        assert one.future.result(5)


def test_an_error_of_reading_goes_to_its_own_request():
    def read(job):
        if job.group == "bad":
            raise RequestError("not an image")

    with batches_of(read=read) as (batches, _, go):
        go.set()
        bad, good = job_of("bad", 1), job_of("good", 1)
        batches.add(bad)
        batches.add(good)
        assert isinstance(bad.future.exception(5), RequestError) and good.future.result(5)
        wait_until(lambda: batches.ahead == 0)


def test_clients_that_disconnect_give_their_places_back():
    with batches_of(places=2) as (batches, ran, go):
        running, waiting, late = (job_of() for _ in range(3))
        batches.add(running)
        wait_until(lambda: ran)
        batches.add(waiting)
        with pytest.raises(RequestError, match=r"queue full \(2 requests run or wait\)") as raised:
            batches.add(late)
        assert raised.value.status == 503
        waiting.disconnected.set()
        batches.add(late)
        assert waiting.future.exception(5).status == 499 and waiting.streamer.ended == 1
        go.set()
        assert late.future.result(5) and ran[1:] == [[late]]


def test_all_jobs_can_be_abandoned():
    with batches_of() as (batches, ran, _):
        jobs = [job_of(), job_of(images=1)]
        batches.add(jobs[0])
        wait_until(lambda: ran)
        batches.add(jobs[1])
        batches.abandon(RequestError("enough", status=503))
        assert all(job.future.exception(5).status == 503 and job.streamer.ended == 1 for job in jobs)
    assert len(ran) == 1


def test_a_cancelled_request_is_not_read():
    with batches_of(read=lambda job: job.inputs["input_ids"].fill_(1)) as (batches, ran, go):
        go.set()
        job, other = job_of(), job_of()
        job.future.cancel()
        batches.add(job)
        batches.add(other)
        assert other.future.result(5) and ran == [[other]]
        assert not job.inputs["input_ids"].any() and batches.waiting == 0


def test_each_row_ends_on_its_own():
    """By an end token (9), a stop string (tokens 1 and 2), its length, or a client that has disconnected."""
    jobs = [job_of(), job_of(stop=["bc"]), job_of(), job_of()]
    jobs[3].disconnected.set()
    ended = []
    rows = Rows(jobs, lambda job: job.done and ended.append(jobs.index(job)))
    tokens = torch.tensor([[1, 9, 5, 5, 5], [1, 2, 3, 4, 5], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = [rows(torch.cat([torch.zeros(4, 3).long(), tokens[:, : n + 1]], 1), None).tolist() for n in range(5)]
    assert found == [[False, False, False, True], *[[True, True, False, True]] * 2, *[[True] * 4] * 2]
    assert [job.tokens for job in jobs] == [[1, 9], [1, 2], [1, 1, 1, 1], []]
    assert [job.finish_reason for job in jobs] == ["stop", "stop", "length", None]
    assert sorted(ended) == [0, 1, 2]


def test_inputs_are_padded_on_the_left(checkpoint):
    processor = checkpoint[1]
    images = [CARDS[0]["image"], CARDS[3]["image"].crop((0, 0, 256, 64))]
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
        )
        for text in ("what shape is on the red card?", "how many?")
    ]
    for lazy in (False, True):
        options = {"return_tensors": "pt", "lazy_tiles": lazy}
        expected = processor(text=texts, images=[[image] for image in images], padding=True, **options)
        rows = [dict(processor(text=[text], images=[[image]], **options)) for text, image in zip(texts, images)]
        batch = collate(rows, processor.tokenizer.pad_token_id)
        assert set(batch) == set(expected)
        for name, value in batch.items():
            if name == "lazy_tiles":
                assert value.counts == expected[name].counts and torch.equal(
                    value.cut([1], [2]), expected[name].cut([1], [2])
                )
            else:
                assert torch.equal(value, expected[name].to(value.dtype)), name
