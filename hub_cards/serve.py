"""Serve a QGSA-SmolVLM checkpoint to OpenAI clients.

    python hub_cards/serve.py --model outputs/demo

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="outputs/demo", messages=[...], extra_body={"qgsa": {"max_tiles": 2}})

`POST /v1/chat/completions` (also as a stream), `GET /v1/models` and `GET /health`. A response has one field more,
`qgsa`: what was looked at. Of a checkpoint no code and no pickle is run. There are no keys: put what faces the world
behind a proxy that asks for them.

This is not `transformers serve`, because that finds models by the names in its own tables, which no `register` call
reaches, and has no hook for limits on images and URLs or for another field.
"""

import asyncio
import json
import reprlib
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from serve_images import decode, load_images
from serve_requests import INTERNAL, ChatRequest, Limits, RequestError, check_limits, error_body, parse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from transformers import (
    AsyncTextIteratorStreamer,
    BatchFeature,
    PreTrainedConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

from modeling_qgsa import QGSAConfig, QGSAProcessor, QGSASmolVLMForConditionalGeneration
from modeling_qgsa.configuration_qgsa import Budget
from modeling_qgsa.selection_qgsa import read_layout
from training.cli.arguments import check_source
from training.cli.arguments import parse as parse_arguments


SECONDS_TO_SEND = 60  # a request: its body is held in memory meanwhile
SPARE_CONNECTIONS = 8  # for /health, and for those that are told to come again


@dataclass
class ServeArguments(Limits):
    """What to serve, where, and within which limits."""

    model: str = field(default="hub_cards/tiny-qgsa", metadata={"help": "QGSA checkpoint: Hub id or folder."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen at; 0.0.0.0 is all of them."})
    port: int = field(default=8000, metadata={"help": "Port to listen at."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cpu or cuda."})


def load(name: str, device: str = "cpu"):
    """Load `(model, processor)` of a Hub id or folder. Raises ValueError for a checkpoint of another model type."""
    check_source(name)
    found = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    if found != QGSAConfig.model_type:
        raise ValueError(
            f"{name} is of model type {found!r}, not {QGSAConfig.model_type!r}: make one of it with "
            "QGSASmolVLMForConditionalGeneration.from_dense"
        )
    model = QGSASmolVLMForConditionalGeneration.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
    processor = QGSAProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    return model.to(device).eval(), processor


class StopWhen(StoppingCriteria):
    """Stops where the new text holds a stop string (`found`), or when the client is gone."""

    def __init__(self, tokenizer, prompt_tokens: int, strings: list[str], gone: threading.Event):
        self.tokenizer, self.prompt_tokens, self.strings, self.gone = tokenizer, prompt_tokens, strings, gone
        self.found = False

    def __call__(self, input_ids, scores, **kwargs):
        if self.strings:
            text = self.tokenizer.decode(input_ids[0, self.prompt_tokens :], skip_special_tokens=True)
            self.found = any(string in text for string in self.strings)
        return torch.full((1,), self.found or self.gone.is_set(), device=input_ids.device)


@dataclass
class Answer:
    """What is known of an answer beside its text.

    Args:
        finish_reason: "stop" or "length".
        prompt_tokens: all of them, those of the images too that the model did not look at.
        completion_tokens: with the one that ends the answer.
        qgsa: what was looked at, see `Answerer.describe`; None where there were no images.
    """

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    qgsa: dict | None

    @property
    def usage(self) -> dict:
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return {**counts, "total_tokens": sum(counts.values())}


class Answerer:
    """Answers requests in threads of its own, `limits.concurrency` at once and in the order they came.

    Args:
        model: in evaluation mode.
        processor: of the same checkpoint.
        limits: what a request may cost.
    """

    def __init__(self, model: QGSASmolVLMForConditionalGeneration, processor: QGSAProcessor, limits: Limits):
        self.model, self.processor, self.limits = model, processor, limits
        self.name = model.name_or_path
        self.threads = ThreadPoolExecutor(limits.concurrency)
        self.places = threading.Semaphore(limits.concurrency + limits.max_waiting)
        self.context = model.config.text_config.max_position_embeddings
        self.markers = list(processor.tokenizer.get_added_vocab())
        self.max_characters = self.context * max(map(len, processor.tokenizer.get_vocab()))

    def check(self, chat: ChatRequest):
        """Raise RequestError for what can be refused before anything is loaded."""
        if chat.model not in (None, self.name):
            message = f"model is {reprlib.repr(chat.model)}: this server has {self.name!r}"
            raise RequestError(message, "model", status=404, code="model_not_found")
        try:
            self.budget(chat)
        except ValueError as error:
            raise RequestError(f"qgsa: {error}", "qgsa") from error
        check_limits(chat, self.limits, self.markers, self.max_characters)

    def budget(self, chat: ChatRequest) -> Budget:
        return Budget.of(self.model.config, **chat.qgsa.model_dump())

    def start(self, chat: ChatRequest, images: list, streamer, gone: threading.Event) -> asyncio.Future:
        """Have a request answered: its text goes to `streamer`, and the future becomes its `Answer`.

        `gone` stops it. Raises RequestError (503) where too many wait already.
        """
        if not self.places.acquire(blocking=False):
            message = f"{self.limits.max_waiting} requests wait already, which is the most: try again later"
            raise RequestError(message, status=503, code="overloaded")
        future = self.threads.submit(self.answer, chat, images, streamer, gone)
        future.add_done_callback(lambda _: self.places.release())
        return asyncio.wrap_future(future)

    def answer(self, chat: ChatRequest, images: list, streamer, gone: threading.Event) -> Answer:
        """Answer a request, in a thread. Raises RequestError for images and questions that cannot be answered."""
        try:
            if gone.is_set():
                raise RequestError("the client is gone", status=499)
            started = time.perf_counter()
            inputs = self.prepare(chat, images)
            prompt_tokens = inputs["input_ids"].shape[1]
            options = self.options(chat, prompt_tokens)
            stop = StopWhen(self.processor.tokenizer, prompt_tokens, chat.stop, gone)
            if chat.seed is not None:
                torch.manual_seed(chat.seed)
            output = self.model.generate(
                **inputs,
                **options,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([stop]),
                return_dict_in_generate=True,
            )
            new = output.sequences[0, prompt_tokens:].tolist()
            eos = self.model.generation_config.eos_token_id
            ended = stop.found or new[-1] in (eos if isinstance(eos, list) else [eos])
            qgsa = None
            if images:
                qgsa = self.describe(inputs["input_ids"], output.get("selection"))
                qgsa["seconds"] = time.perf_counter() - started
            return Answer("stop" if ended else "length", prompt_tokens, len(new), qgsa)
        finally:
            streamer.end()

    def prepare(self, chat: ChatRequest, images: list) -> BatchFeature:
        """The inputs of the model. Raises RequestError."""
        text = self.processor.apply_chat_template(chat.turns(), add_generation_prompt=True)
        for image, (where, _) in zip(images, chat.image_urls):
            decode(image, where)
        lazy = self.budget(chat).selection != "dense"
        try:
            inputs = self.processor(
                text=[text], images=[images] if images else None, return_tensors="pt", lazy_tiles=lazy
            )
        except ValueError as error:  # an image of a line, or one without a question
            raise RequestError(f"messages: {error}", "messages") from error
        return inputs.to(self.model.device)

    def options(self, chat: ChatRequest, prompt_tokens: int) -> dict:
        """Arguments of `generate`. Raises RequestError where the context has no room for prompt and answer."""
        asked = chat.max_completion_tokens or chat.max_tokens
        left = self.context - prompt_tokens
        if left < (asked or 1):
            message = (
                f"messages: a prompt of {prompt_tokens} tokens and an answer of {asked or 1}, the model's context "
                f"holds {self.context}"
            )
            raise RequestError(message, "messages", code="context_length_exceeded")
        options = {"max_new_tokens": asked or min(self.limits.max_new_tokens, left)}
        if chat.samples:
            options |= {"do_sample": True, "temperature": chat.temperature, "top_p": chat.top_p, "top_k": 0}
        else:
            options["do_sample"] = False
        return options | chat.qgsa.model_dump(exclude_none=True)

    def describe(self, input_ids: torch.LongTensor, selection) -> dict:
        """What was looked at of each image; all of it without a `selection`.

        Returns visual_tokens (kept) and tiles (encoded at high resolution), and those of "dense"; one number an image.
        """
        config = self.model.config
        marker_ids = (config.image_token_id, config.global_image_token_id, config.tile_token_ids)
        layout = read_layout(input_ids, config.tokens_per_tile, *marker_ids)
        tiles = [rows * columns for rows, columns in layout.grids.tolist()]
        tokens = [(count + 1) * config.tokens_per_tile for count in tiles]
        described = {"visual_tokens": tokens, "visual_tokens_dense": tokens, "tiles": tiles, "tiles_dense": tiles}
        if selection is not None:
            kept = selection.kept_tokens[0].split(tokens)
            looked = selection.kept_tiles[0].split([count + 1 for count in tiles])
            described["visual_tokens"] = [int(image.sum()) for image in kept]
            described["tiles"] = [int(image[:-1].sum()) for image in looked]  # the last one is the global view
        return described


def end_of_answer(text: str, stops: list[str], complete: bool) -> int:
    """Length of what may be sent of a text: up to the first stop string, or to what may become one."""
    found = [text.index(stop) for stop in stops if stop in text]
    if found or complete:
        return min(found, default=len(text))
    return len(text) - max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


async def cut(pieces: AsyncIterator[str], stops: list[str]) -> AsyncIterator[str]:
    """A text in pieces, up to the first stop string and without spaces in front: the template has one there."""
    text, sent = "", 0
    async for piece in pieces:
        text += piece
        sent = max(sent, len(text) - len(text.lstrip()))
        end = end_of_answer(text, stops, complete=False)
        if end > sent:
            yield text[sent:end]
            sent = end
    if end_of_answer(text, stops, complete=True) > sent:
        yield text[sent : end_of_answer(text, stops, complete=True)]


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read the body, whatever length it says it has. Raises RequestError (413) beyond `max_bytes`."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise RequestError(f"the request has more than the {max_bytes} bytes that are allowed", status=413)
    return bytes(body)


async def watch(request: Request, gone: threading.Event):
    """Set `gone` when the client is."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)
    gone.set()


async def respond(request: Request, answerer: Answerer) -> JSONResponse | StreamingResponse:
    """Answer a chat completion. Raises RequestError, in a stream only before its first word."""
    try:
        async with asyncio.timeout(SECONDS_TO_SEND):
            body = await read_body(request, answerer.limits.max_bytes)
    except TimeoutError as error:
        raise RequestError(f"the request took more than {SECONDS_TO_SEND} seconds to arrive", status=408) from error
    chat = await asyncio.to_thread(parse, body)  # of many megabytes it takes seconds, and others wait
    answerer.check(chat)
    images = await load_images(chat, answerer.limits)

    gone = threading.Event()
    tokenizer = answerer.processor.tokenizer
    streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = answerer.start(chat, images, streamer, gone)
    watching = asyncio.create_task(watch(request, gone))
    answer.add_done_callback(lambda _: watching.cancel())

    pieces = cut(streamer, chat.stop)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": answerer.name}
    if chat.stream:
        first = await anext(pieces, None)
        if first is None:
            await answer  # an error is to be a response of its own
        return StreamingResponse(events(chat, head, first, pieces, answer), media_type="text/event-stream")
    text = "".join([piece async for piece in pieces])
    done = await answer
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": done.finish_reason}
    return JSONResponse(
        {**head, "object": "chat.completion", "choices": [choice], "usage": done.usage, "qgsa": done.qgsa}
    )


async def events(chat: ChatRequest, head: dict, first: str | None, pieces, answer) -> AsyncIterator[str]:
    """The answer as server-sent events."""

    def event(fields: dict) -> str:
        return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', **fields})}\n\n"

    def delta(fields: dict, finish_reason=None) -> dict:
        return {"choices": [{"index": 0, "delta": fields, "logprobs": None, "finish_reason": finish_reason}]}

    try:
        yield event(delta({"role": "assistant", "content": first or ""}))
        async for piece in pieces:
            yield event(delta({"content": piece}))
        done = await answer
    except Exception:
        yield f"data: {json.dumps(error_body(INTERNAL))}\n\n"
        raise
    yield event({**delta({}, done.finish_reason), "qgsa": done.qgsa})
    if chat.stream_options.include_usage:
        yield event({"choices": [], "usage": done.usage})
    yield "data: [DONE]\n\n"


def refuse(request: Request, error: Exception) -> JSONResponse:
    """Any error in OpenAI's form; of those that nobody foresaw no more than that there was one."""
    if isinstance(error, HTTPException):
        error = RequestError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
    elif isinstance(error, ClientDisconnect):
        error = RequestError("the client is gone", status=499)
    elif not isinstance(error, RequestError):
        error = INTERNAL
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse(error_body(error), error.status, headers)


def make_app(model: QGSASmolVLMForConditionalGeneration, processor: QGSAProcessor, limits: Limits) -> FastAPI:
    """The server as an ASGI application; arguments as in `Answerer`."""
    answerer, started = Answerer(model, processor, limits), int(time.time())
    handled = (RequestError, HTTPException, ClientDisconnect, Exception)
    app = FastAPI(openapi_url=None, exception_handlers=dict.fromkeys(handled, refuse))

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models():
        entry = {"id": answerer.name, "object": "model", "created": started, "owned_by": "qgsa"}
        return {"object": "list", "data": [entry]}

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        return await respond(request, answerer)

    return app


def main():
    try:
        run = parse_arguments(ServeArguments, __doc__)
        app = make_app(*load(run.model, run.device), run)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    connections = run.concurrency + run.max_waiting + SPARE_CONNECTIONS
    uvicorn.run(app, host=run.host, port=run.port, limit_concurrency=connections)


if __name__ == "__main__":
    main()
