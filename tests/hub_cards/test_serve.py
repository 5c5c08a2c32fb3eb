"""The server of hub_cards/serve.py, called by the real OpenAI client on a local port."""

import asyncio
import base64
import io
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import openai
import pytest
import serve
from PIL import Image
from serve import Limits, ServeArguments, cut, load, load_served, make_app
from serve_errors import RequestError
from serve_images import fetch, is_public
from serving import serving

from modeling_qgsa import GuidedVLM
from modeling_qgsa.tuning_qgsa import Tuning
from training.data.cards import Cards


NAME = "hub_cards/tiny-qgsa"
CARDS = Cards("test", 40)


def connect(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def tuning(tmp_path_factory):
    """The file in which the script keeps its tuning."""
    return tmp_path_factory.mktemp("tuning") / "tuning.json"


@pytest.fixture(scope="module", autouse=True)
def script(tuning):
    """The script, started first: its imports take seconds, in parallel with the tests."""
    command = [sys.executable, "hub_cards/serve.py", "--port", "0", "--max_pixels", "1000", "--tuning", str(tuning)]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.terminate()


@pytest.fixture(scope="module")
def checkpoint():
    return load(NAME)


@pytest.fixture(scope="module")
def url(checkpoint):
    with serving(make_app(*checkpoint, Limits(max_request_mb=1, max_images=2, max_pixels=10**6))) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return connect(url)


@pytest.fixture(scope="module")
def ask(client):
    def make(messages, **options):
        return client.chat.completions.create(model=NAME, messages=messages, **options)

    return make


@pytest.fixture(scope="module")
def expect(checkpoint):
    """Answer of `generate` to the same turns, without the server: `(text, selection)`."""
    model, processor = checkpoint

    def make(turns, images=(), **options):
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = processor(text=[text], images=[list(images)] if images else None, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=20, return_dict_in_generate=True, **options)
        new = output.sequences[0, inputs["input_ids"].shape[1] :]
        return processor.decode(new, skip_special_tokens=True).strip(), output.get("selection")

    return make


def encode(image, kind="PNG"):
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


def part(image):
    """Message part of an image, its bytes or its URL."""
    image = encode(image) if isinstance(image, Image.Image) else image
    if isinstance(image, bytes):
        image = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    return {"type": "image_url", "image_url": {"url": image}}


def user(text, *images):
    return {"role": "user", "content": [*map(part, images), {"type": "text", "text": text}]}


def turn(role, text, images=0):
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def text_of(response):
    return response.choices[0].message.content


# Answers


@pytest.mark.parametrize("index", range(5))
def test_an_answer_is_that_of_generate(index, ask, expect):
    sample = CARDS[index]
    response = ask([user(sample["question"], sample["image"])])
    text, selection = expect([turn("user", sample["question"], 1)], [sample["image"]])
    assert text and text_of(response) == text
    assert response.choices[0].finish_reason == "stop"
    looked = {"visual_tokens": selection.visual_tokens.tolist(), "tiles": selection.tiles.tolist()}
    seconds = response.qgsa.pop("seconds")
    dense = {"visual_tokens_dense": [272], "tiles_dense": [16], "vision_share": 1.0}
    assert response.qgsa == {**looked, **dense} and 0 < seconds < 60
    usage = response.usage
    assert usage.prompt_tokens > 272 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_text_without_images(ask, expect):
    response = ask([{"role": "user", "content": "hello there"}])
    assert text_of(response) == expect([turn("user", "hello there")])[0]
    assert response.qgsa is None


def test_several_turns_and_images(ask, expect):
    (first, second), question = (CARDS[2], CARDS[4]), "what shape is on the green card?"
    messages = [
        {"role": "system", "content": "answer in a word"},
        user(first["question"], first["image"]),
        {"role": "assistant", "content": "three"},
        user(question, second["image"]),
    ]
    turns = [
        turn("system", "answer in a word"),
        turn("user", first["question"], 1),
        turn("assistant", "three"),
        turn("user", question, 1),
    ]
    text, selection = expect(turns, [first["image"], second["image"]])
    response = ask(messages)
    assert text_of(response) == text
    assert len(response.qgsa["tiles"]) == 2 and response.qgsa["tiles_dense"] == [16, 16]
    assert sum(response.qgsa["visual_tokens"]) == int(selection.visual_tokens)
    assert sum(response.qgsa["tiles"]) == int(selection.tiles)


@pytest.mark.parametrize(
    "budget, looked",
    [
        ({"min_tiles": 3, "max_tiles": 3, "min_visual_tokens": 20, "max_visual_tokens": 20}, ([20], [3])),
        ({"selection": "after_encoder", "min_visual_tokens": 9, "max_visual_tokens": 9}, ([9], [16])),
        ({"selection": "dense"}, ([272], [16])),
        ({"max_image_tokens": 15, "min_visual_tokens": 15, "min_tiles": 2}, ([15], [2])),  # 8 tiles for 60
    ],
)
def test_budgets_of_a_request(budget, looked, ask, expect):
    sample = CARDS[0]
    response = ask([user(sample["question"], sample["image"])], extra_body={"qgsa": budget})
    assert (response.qgsa["visual_tokens"], response.qgsa["tiles"]) == looked
    assert text_of(response) == expect([turn("user", sample["question"], 1)], [sample["image"]], **budget)[0]


@pytest.mark.parametrize("vision_budget", ["FFCCCT", "CTTTTT"])
def test_how_deep_vision_goes_in_a_request(vision_budget, ask, expect):
    sample = CARDS[0]
    budget = {"vision_budget": vision_budget}
    response = ask([user(sample["question"], sample["image"])], extra_body={"qgsa": budget})
    text, selection = expect([turn("user", sample["question"], 1)], [sample["image"]], **budget)
    assert text_of(response) == text
    assert response.qgsa["vision_share"] == pytest.approx(float(selection.vision_share[0]), abs=1e-4)
    assert response.qgsa["vision_share"] < 0.5


@pytest.mark.parametrize("threshold, answered_by", [(-1.0, "guide"), (1.5, "target")])
@pytest.mark.parametrize("stream", [False, True])
def test_a_pair_says_who_answered(checkpoint, expect, threshold, answered_by, stream):
    model, processor = checkpoint
    pair = GuidedVLM(model, model, processor, exit_threshold=threshold, max_tiles=2)
    sample = CARDS[0]
    expected = pair.generate(**pair.prepare(**prompt_of(processor, sample)), max_new_tokens=20).sequences[0]
    with serving(make_app(model, processor, Limits(), pair)) as url:
        options = {"model": NAME, "messages": [user(sample["question"], sample["image"])], "stream": stream}
        response = connect(url).chat.completions.create(**options)
        if stream:
            *pieces, response = list(response)
            text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        else:
            text = text_of(response)
        with pytest.raises(openai.BadRequestError, match="max_tiles.*guide of this server decides"):
            connect(url).chat.completions.create(**options, extra_body={"qgsa": {"max_tiles": 1}})
    length = len(processor.tokenizer(prompt_of(processor, sample)["text"][0])["input_ids"])
    assert text.strip() and text.strip() in processor.decode(expected[length:], skip_special_tokens=True)
    assert response.qgsa["answered_by"] == answered_by and 0 < response.qgsa["confidence"] <= 1
    assert response.qgsa["tiles"] == ([0] if answered_by == "guide" else [2])


def prompt_of(processor, sample):
    text = processor.apply_chat_template([turn("user", sample["question"], 1)], add_generation_prompt=True)
    return {"text": [text], "images": [[sample["image"]]]}


def test_a_pair_is_loaded_from_its_folder_or_from_two(checkpoint, tmp_path):
    model, processor = checkpoint
    GuidedVLM(model, model, processor, exit_threshold=0.5).save_pretrained(tmp_path)
    served, _, pair = load_served(ServeArguments(model=str(tmp_path), device="cpu"))
    assert pair.target is served and pair.guidance.exit_threshold == 0.5 and served.name_or_path == str(tmp_path)
    served, _, pair = load_served(ServeArguments(guide=NAME, device="cpu"))
    assert pair.target is served and pair.guidance.exit_threshold is None
    assert load_served(ServeArguments(device="cpu"))[2] is None
    with pytest.raises(ValueError, match="is a pair and has one"):
        load_served(ServeArguments(model=str(tmp_path), guide=NAME))


def test_an_image_of_a_single_tile(ask):
    response = ask([user("how many cards are there?", CARDS[0]["image"].resize((64, 4)))])
    assert response.qgsa["tiles_dense"] == [4]
    response = ask([user("how many?", Image.new("RGB", (50, 50)))], extra_body={"qgsa": {"max_visual_tokens": 8}})
    assert response.qgsa["visual_tokens"] == [8]


def test_a_turned_photograph_is_set_upright(ask):
    sample, data = CARDS[0], io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by a quarter turn
    sample["image"].rotate(90).save(data, "PNG", exif=exif)
    assert text_of(ask([user(sample["question"], data.getvalue())])) == sample["answer"]


def test_end_of_an_answer(ask):
    messages = [{"role": "user", "content": "hello there"}]
    whole = ask(messages)
    words = text_of(whole).split()
    assert len(words) > 2
    short = ask(messages, max_completion_tokens=2, n=1, logprobs=False, user="somebody")
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2
    assert text_of(whole).startswith(text_of(short))
    for stop in (words[2], [words[2][:2], "no such word"]):
        cut_off = ask(messages, stop=stop)
        assert text_of(cut_off) == " ".join(words[:2]) + " " and cut_off.choices[0].finish_reason == "stop"
        assert cut_off.usage.completion_tokens < whole.usage.completion_tokens
        streamed = ask(messages, stop=stop, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text_of(cut_off)


@pytest.mark.parametrize(
    "pieces, stops, expected",
    [
        ([" ", " a b", "c d"], [], "a bc d"),
        (["a b", "c d"], ["bc"], "a "),
        (["a b", "d"], ["bc"], "a bd"),
        (["a b"], ["bc"], "a b"),
        (["\n", "a"], ["\n"], ""),
        (["abc"], ["c", "ab"], ""),
    ],
)
def test_stop_strings_across_pieces(pieces, stops, expected):
    async def collect():
        async def given():
            for piece in pieces:
                yield piece

        return "".join([piece async for piece in cut(given(), stops)])

    assert asyncio.run(collect()) == expected


def test_a_seed_repeats_a_sampled_answer(ask):
    messages = [{"role": "user", "content": "hello there"}]

    def sample(seed):
        return text_of(ask(messages, temperature=2, top_p=0.99, seed=seed, max_tokens=8))

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


# Streams


def test_a_stream_says_the_same(ask, url):
    sample = CARDS[6]
    messages = [user(sample["question"], sample["image"])]
    whole = ask(messages)
    chunks = list(ask(messages, stream=True, stream_options={"include_usage": True}))
    *words, last, usage = chunks
    assert words[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in words) == text_of(whole)
    assert last.choices[0].finish_reason == "stop" and not usage.choices
    assert {**last.qgsa, "seconds": 0} == {**whole.qgsa, "seconds": 0} and usage.usage == whole.usage

    body = {"messages": messages, "stream": True}
    lines = httpx.post(f"{url}/v1/chat/completions", json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(not json.loads(line.removeprefix("data: ")).get("usage") for line in lines[:-2])


def test_errors_before_a_stream_are_no_stream(ask):
    with pytest.raises(openai.BadRequestError, match="1 x 50 px"):
        ask([user("what?", Image.new("RGB", (1, 50)))], stream=True)


def test_an_image_without_a_question_is_answered_from_all_of_it(ask):
    response = ask([user(" ", CARDS[0]["image"])])
    assert text_of(response) and response.qgsa["visual_tokens"] == [17 * 16]


# Several clients


@pytest.mark.parametrize("size", [1, 3])
def test_concurrent_requests_each_get_their_answer(size, checkpoint, expect):
    samples = [CARDS[index] for index in range(8)]
    expected = [expect([turn("user", s["question"], 1)], [s["image"]])[0] for s in samples]
    assert len(set(expected)) > 3
    with serving(make_app(*checkpoint, Limits(max_batch_size=size))) as url, ThreadPoolExecutor(8) as threads:
        client = connect(url)

        def ask(sample):
            messages = [user(sample["question"], sample["image"])]
            return text_of(client.chat.completions.create(model=NAME, messages=messages))

        assert list(threads.map(ask, samples)) == expected


class Pace:
    """Hook that counts the steps of a model and pauses it unless `open` is set."""

    def __init__(self):
        self.steps, self.open = 0, threading.Event()
        self.open.set()

    def __call__(self, *_):
        self.steps += 1
        assert self.open.wait(20)
        time.sleep(0.005)


@pytest.fixture(scope="module")
def endless():
    """A server whose answers only end at 512 tokens, and the pace of its model."""
    model, processor = load(NAME)
    model.generation_config.eos_token_id = None
    pace = Pace()
    model.register_forward_pre_hook(pace)
    with serving(make_app(model, processor, Limits(max_batch_size=1, max_waiting=1))) as url:
        yield url, pace


def test_health_during_an_answer_and_a_full_queue(endless):
    url, pace = endless
    body = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 3}
    pace.open.clear()
    with ThreadPoolExecutor(3) as threads:
        try:
            asked = [threads.submit(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=20) for _ in "abc"]
            while not any(future.done() for future in asked):
                time.sleep(0.01)
            assert httpx.get(f"{url}/health", timeout=2).json() == {"status": "ok"}
        finally:
            pace.open.set()
        one, two, rejected = sorted((future.result() for future in asked), key=lambda response: response.status_code)
    assert (one.status_code, two.status_code, rejected.status_code) == (200, 200, 503)
    assert rejected.headers["retry-after"] == "1"
    error = rejected.json()["error"]
    assert error["type"] == "server_error" and "queue full (2 requests run or wait)" in error["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_generation_stops_when_the_client_disconnects(stream, endless):
    url, pace = endless
    pace.steps = 0
    body = {"messages": [{"role": "user", "content": "hello there"}], "stream": stream}
    if stream:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            assert next(response.iter_lines()).startswith("data: ")
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.2)
    steps = -1
    while steps != pace.steps:
        steps = pace.steps
        time.sleep(0.3)
    assert 0 < steps < 400
    body = {**body, "stream": False, "max_tokens": 1}
    assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200


# Errors

HELLO = [{"role": "user", "content": "hello there"}]
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"messages": []}, "messages: List should have at least 1 item .* not 0"),
        ({"messages": "hi"}, "messages: .* array, not 'hi'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages.0.role: .*'system', 'user' or 'assistant', not"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content: "),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages.0.content.0.type: .* 'video'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text is required in a part of type 'text'"),
        ({"messages": [{"role": "system", "content": [part(b"")]}]}, r"messages.0: role \('system'\) must be 'user'"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "a", "tool_calls": [1]}]}, "messages.1.tool_calls: "),
        ({"n": 2}, "n: not supported by this server"),
        ({"tools": [{"type": "function"}]}, "tools: "),
        ({"logprobs": True}, "logprobs: "),
        ({"temperature": -1}, "temperature: .* 0, not -1"),
        ({"temperature": "hot"}, "temperature: .* not 'hot'"),
        ({"top_p": 0}, "top_p: .* 0, not 0"),
        ({"max_tokens": 513}, r"max_tokens \(513\) must be at most 512"),
        ({"max_tokens": 0}, "max_tokens: .* 1, not 0"),
        ({"stop": ""}, "stop.0: "),
        ({"stream": "yes"}, "stream: .* not 'yes'"),
        ({"qgsa": {"tiles": 3}}, "qgsa.tiles: "),
        ({"qgsa": {"max_tiles": "3"}}, "qgsa.max_tiles: .* not '3'"),
        ({"qgsa": {"max_visual_tokens": 2**31}}, "qgsa: .*max_visual_tokens"),
        ({"qgsa": {"max_image_tokens": 0}}, r"qgsa: max_image_tokens \(0\) must be an integer of 1 to 2147483647"),
        ({"qgsa": {"max_image_tokens": 2**31}}, "qgsa: max_image_tokens .2147483648. must be an integer of 1 to"),
        ({"qgsa": {"max_image_tokens": 9, "max_visual_tokens": 8}}, "max_image_tokens .9, .* contradicts max_visual_"),
        ({"qgsa": {"max_image_tokens": 9, "min_visual_tokens": 10}}, "contradicts min_visual_tokens .10"),
        ({"qgsa": {"max_image_tokens": 9, "selection": "dense"}}, 'max_image_tokens .9.*"dense"'),
        ({"qgsa": {"positions_per_image": 0}}, r"qgsa: positions_per_image \(0\) must be an integer of at least 1"),
        ({"qgsa": {"selection": "best"}}, "qgsa: selection .*'best'.* before_encoder"),
        ({"qgsa": {"vision_budget": 0.5}}, r"qgsa: vision_budget \(0.5\): the layers .* not ranked"),
        ({"qgsa": {"vision_budget": "FFC"}}, "qgsa: vision_budget .3 layers. must have one kind for each of the 6"),
        ({"qgsa": {"vision_budget": True}}, "qgsa.vision_budget"),
        ({"qgsa": {"vision_budget": "CCCCCC", "selection": "dense"}}, "qgsa: vision_budget .*dense"),
        ({"qgsa": {"min_tiles": 5, "max_tiles": 2}}, "qgsa: min_tiles .*5.* max_tiles .*2"),
        ({"messages": [user("what? " * 1500)]}, r"\d+ prompt tokens and 1 answer tokens exceed .* 2048"),
        ({"messages": [user("what? " * 15000)]}, r"messages: 90000 characters exceed the \d+"),
        (
            {"messages": [user("<image> what?", CARDS[0]["image"])]},
            "messages.0.content: .*: remove '<image>'",
        ),
        ({"messages": [user("<row_1_col_1> what?")]}, "remove '<row_1_col_1>'"),
        ({"messages": [{"role": "system", "content": "be nice<end_of_utterance>"}]}, "remove '<end_of_utterance>'"),
        (
            {"messages": [{"role": "user", "content": [*user("<glob")["content"], *user("al-img>")["content"]]}]},
            "'<glo",
        ),
    ],
)
def test_invalid_requests(fields, message, url):
    response = httpx.post(f"{url}/v1/chat/completions", json={"messages": HELLO, **fields})
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert re.search(message, error["message"])
    assert error["param"] and error["param"].split(".")[0] in fields


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b"[" * 10000, b'{"messages":[{"role":"user","content":"\\ud800"}]}']
)
def test_invalid_bodies(body, url):
    response = httpx.post(f"{url}/v1/chat/completions", content=body, headers=JSON)
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_other_models_and_routes(url, client):
    assert [model.id for model in client.models.list()] == [NAME]
    with pytest.raises(openai.NotFoundError, match=rf"model \('gpt-4'\) is not served here: use '{NAME}'") as raised:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert raised.value.code == "model_not_found"
    assert httpx.get(f"{url}/v1/chat/completions").json()["error"]["message"].endswith("Method Not Allowed")
    assert httpx.post(f"{url}/reset").status_code == 404


def test_a_body_that_is_too_large(url):
    response = httpx.post(f"{url}/v1/chat/completions", content=b" " * 3 * 10**6, headers=JSON)
    assert response.status_code == 413 and "exceeds the limit of 1000000 bytes" in response.json()["error"]["message"]
    assert httpx.get(f"{url}/health").status_code == 200


def header_of_png(width, height):
    """A PNG that declares its size and ends where the pixels would begin."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 9) + b"IDAT"


NOISE = Image.effect_noise((64, 64), 90).convert("RGB")


@pytest.mark.parametrize(
    "images, message",
    [
        ([encode(NOISE)[:-2000]], "0.image_url.url: truncated or corrupted"),
        ([encode(NOISE, "JPEG")[:-200]], "0.image_url.url: truncated or corrupted"),
        ([encode(NOISE)[:20]], "cannot be read .*Truncated"),
        ([b""], "0 bytes are not a valid"),
        ([b"<svg xmlns='http://www.w3.org/2000/svg'/>"], "not a valid"),
        ([encode(NOISE, "TIFF")], "not a valid PNG, JPEG, WEBP, GIF image"),
        (["data:image/png;base64,a"], "invalid base64 data"),
        (["data:image/png;base64,%%%%"], "invalid base64 data"),
        (["data:text/plain;base64,aGk="], "must be a data:image"),
        (["/etc/passwd"], "must be a data:image"),
        (["file:///etc/passwd"], "must be a data:image"),
        (["http://127.0.0.1/a.png"], "the server does not fetch URLs"),
        ([header_of_png(2000, 1000)], "2000 x 1000 px bring the request to 2000000 pixels, but the limit is 1000000"),
        ([header_of_png(100_000, 100_000)], "decompression bomb"),
        (
            [Image.new("L", (800, 800)), Image.new("L", (800, 800))],
            "1.image_url.url: .* to 1280000 pixels",
        ),
        ([Image.new("RGB", (1, 50))], "1 x 50 px"),
        ([NOISE] * 3, "messages: 3 images exceed the limit of 2"),
    ],
)
def test_invalid_images(images, message, ask):
    with pytest.raises(openai.BadRequestError, match=message) as raised:
        ask([user("what is it?", *images)])
    assert raised.value.param.startswith("messages")


def test_unexpected_errors_reveal_no_details(checkpoint):
    class Broken:
        tokenizer, chat_template = checkpoint[1].tokenizer, checkpoint[1].chat_template

        def __call__(self, *_, **__):
            raise KeyError("a secret")

    with serving(make_app(checkpoint[0], Broken(), Limits())) as url:
        for stream in (False, True):
            response = httpx.post(f"{url}/v1/chat/completions", json={"messages": HELLO, "stream": stream})
            assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
            assert "secret" not in response.text and "Traceback" not in response.text
        assert httpx.get(f"{url}/health").status_code == 200


# URLs


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"]
    + ["192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1"]
    + ["fe80::1%eth0", "fc00::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1"]
    + ["2002:7f00:1::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:20::1", "2001:1ff::1", "3fff::1", "3fff:fff::1"]
    + ["192.0.0.1", "192.0.0.9", "192.0.0.10", "192.0.0.255", "192.88.99.1", "192.88.99.255"],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


class Files(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers["host"]))
        self.send_response({"/moved": 302, "/missing": 404}.get(self.path, 200))
        self.send_header("location", "/image.png")
        self.end_headers()
        self.wfile.write(encode(CARDS[0]["image"]))

    def log_message(self, *_):
        pass


@pytest.fixture
def files():
    """A web server of images at 127.0.0.1 that records its requests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_private_addresses_are_not_fetched_from(files, checkpoint):
    hosts = [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0x7f000001",
        "0.0.0.0",
        "[::1]",
        "[::ffff:127.0.0.1]",
    ]
    with serving(make_app(*checkpoint, Limits(allow_urls=True))) as url:
        client = connect(url)
        for host in hosts:
            messages = [user("what is it?", f"http://{host}:{files.server_port}/image.png")]
            with pytest.raises(openai.BadRequestError, match="must resolve to public addresses only"):
                client.chat.completions.create(model=NAME, messages=messages)
        for bad in ("http://", "https://[", "http://nowhere.invalid/a.png", f"http://{'a' * 300}/"):
            with pytest.raises(openai.BadRequestError, match="messages.0.content.0.image_url.url: "):
                client.chat.completions.create(model=NAME, messages=[user("what is it?", bad)])
    assert not files.asked


class Names(asyncio.SelectorEventLoop):
    """An event loop with its own host names, each of which resolves only once."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    async def getaddrinfo(self, host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.names.pop(host)]


def fetch_from(path, files, names, max_bytes=10**6, allowed=lambda address: True):
    url = f"http://cards.example:{files.server_port}{path}"
    with asyncio.Runner(loop_factory=lambda: Names(dict(names))) as runner:
        return runner.run(fetch(url, "url", Limits(allow_urls=True), max_bytes, allowed))


def test_a_url_is_fetched_from_the_address_that_was_checked(files):
    """A second lookup, which could return another address, would fail here."""
    assert fetch_from("/image.png", files, {"cards.example": ["127.0.0.1"]}) == encode(CARDS[0]["image"])
    assert files.asked == [("/image.png", f"cards.example:{files.server_port}")]


@pytest.mark.parametrize(
    "path, options, message",
    [
        ("/image.png", {"max_bytes": 100}, "exceeds the limit of 100 bytes"),
        ("/moved", {}, "status 302, not 200"),
        ("/missing", {}, "status 404, not 200"),
        ("/image.png", {"names": ["8.8.8.8", "127.0.0.1"], "allowed": is_public}, "public addresses only"),
    ],
)
def test_urls_that_are_not_fetched(path, options, message, files):
    names = {"cards.example": options.pop("names", ["127.0.0.1"])}
    with pytest.raises(RequestError, match=message):
        fetch_from(path, files, names, **options)
    assert [path for path, _ in files.asked] in ([], [path])


@pytest.mark.parametrize(
    "authority",
    [
        "a@cards.example",
        "a:b@cards.example",
        "127.0.0.1\\@cards.example",
        "cards.example\\@127.0.0.1",
        "cards%2eexample",
    ]
    + [
        "cards.example\\.127.0.0.1",
        "cards。example",
        "kärten.example",
        "cards.example:0",
        "cards.example:99999",
        "[::1",
    ]
    + [
        "[fe80::1%25eth0]",
        "cards.example ",
        " cards.example",
        "cards\texample",
        "cards.example\n",
        "",
        ":80",
        "a:80:80",
    ],
)
def test_odd_hosts_are_refused_before_any_lookup(authority):
    with asyncio.Runner(loop_factory=lambda: Names({})) as runner:
        with pytest.raises(
            RequestError, match=r"url: .* must be http\(s\)://host/ or http\(s\)://host:port/"
        ) as raised:
            runner.run(
                fetch(f"http://{authority}/image.png", "url", Limits(allow_urls=True), 10**6, lambda address: True)
            )
    assert raised.value.status == 400


# The script


def test_the_script_listens_on_loopback_only(script, tuning):
    url = next(re.findall(r"http://\S+", line)[0] for line in script.stderr if "running on" in line)
    assert url.startswith("http://127.0.0.1:") and script.stdout.readline().startswith("encoder tuned: ")
    assert Tuning.load(tuning, load(NAME)[0].model).by_threads
    assert connect(url).models.list().data[0].id == NAME
    with pytest.raises(openai.BadRequestError, match="the limit is 1000"):
        connect(url).chat.completions.create(model=NAME, messages=[user("what?", NOISE)])


def test_the_script_refuses_a_broken_tuning_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "tuning.json").write_text("{")
    monkeypatch.setattr(sys, "argv", ["serve.py", "--model", NAME, "--tuning", str(tmp_path / "tuning.json")])
    with pytest.raises(SystemExit) as stopped:
        serve.main()
    assert re.fullmatch(
        r"error: .*tuning.json is not a tuning .*; delete the file to measure again", stopped.value.code
    )


def test_arguments():
    assert ServeArguments().host == "127.0.0.1" and not ServeArguments().allow_urls
    too_low = dict.fromkeys(("max_batch_size", "max_pixels", "max_request_mb", "max_image_seconds"), 0)
    for name, number in {**too_low, "max_waiting": -1, "shutdown_timeout": -1}.items():
        with pytest.raises(ValueError, match=rf"{name} \({number}\) must be"):
            ServeArguments(**{name: number})


def test_other_checkpoints_are_not_loaded(tmp_path):
    with pytest.raises(ValueError, match="model type 'qgsa_smolvlm', not 'idefics3'"):
        load("hub_cards/tiny-dense")
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes(Path(NAME, name).read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(OSError, match="safetensors"):
        load(str(tmp_path))
