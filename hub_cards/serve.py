"""Serve a QGSA-SmolVLM checkpoint to OpenAI clients.

    python hub_cards/serve.py --model outputs/demo
    python hub_cards/serve.py --model outputs/demo --guide outputs/small_one
    python hub_cards/serve.py --model outputs/guided/pair

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="outputs/demo", messages=[...], extra_body={"qgsa": {"max_tiles": 2}})

Routes: `POST /v1/chat/completions` (streaming too), `GET /v1/models` and `GET /health`. `qgsa` in a request takes the
budgets of `generate` and `vision_budget`; in a response it has the number of visual tokens and tiles in use, the
share of the text model's work on them, and which of two models answered. The server measures at its start in which
precision the encoder is fastest, and sets it (`model.tune()`). Neither code nor pickles of a checkpoint are run; its
chat template is, and images are read, by processes with bounds on time and memory. The server has no authentication:
expose it only behind a proxy that provides it.

`transformers serve` cannot serve this model: it finds models in tables that `register` calls do not reach, and it has
no limits on images and URLs and no additional response fields.
"""

import asyncio
import json
import reprlib
import threading
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from serve_checkpoints import load, load_pair
from serve_connections import OPTIONS, Places, read_body
from serve_images import Encoded, ImageReader
from serve_requests import INTERNAL, ChatRequest, Limits, RequestError, check_limits, error_body, parse
from serve_templates import ChatTemplate
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from transformers import (
    AsyncTextIteratorStreamer,
    BatchFeature,
    StoppingCriteria,
    StoppingCriteriaList,
)

from modeling_qgsa import GuidedVLM, QGSAProcessor, QGSASmolVLMForConditionalGeneration
from modeling_qgsa.configuration_qgsa import Budget
from modeling_qgsa.guidance_qgsa import GuidedOutput
from modeling_qgsa.layout_qgsa import VisualLayout
from modeling_qgsa.schedule_qgsa import schedule_of
from training.cli.arguments import errors_in_one_line
from training.cli.arguments import parse as parse_arguments


@dataclass
class ServeArguments(Limits):
    """Model, address and limits of the server."""

    model: str = field(default="hub_cards/tiny-qgsa", metadata={"help": "QGSA checkpoint: Hub id or folder."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 for all."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cpu or cuda."})
    guide: str | None = field(
        default=None, metadata={"help": "Small QGSA checkpoint that tells the model where to look."}
    )


def load_served(run: ServeArguments):
    """Load `(model, processor, pair)`: a checkpoint, or a saved pair; `pair` is None if there is no guide.

    Raises ValueError as `load` does, and if a pair gets another guide.
    """
    if not (Path(run.model) / "guidance.json").is_file():
        model, processor = load(run.model, run.device)
        pair = None if run.guide is None else GuidedVLM(load(run.guide, run.device)[0], model, processor)
        return model, processor, pair
    if run.guide is not None:
        raise ValueError(f"guide ({run.guide}): {run.model} is a pair and has one")
    pair = load_pair(run.model, run.device)
    pair.target.name_or_path = run.model
    return pair.target, pair.processors[1], pair


class StopWhen(StoppingCriteria):
    """Stops at a stop string in the new text (`found`), or when the client has disconnected."""

    def __init__(self, tokenizer, prompt_tokens: int, strings: list[str], disconnected: threading.Event):
        self.tokenizer, self.prompt_tokens, self.strings = tokenizer, prompt_tokens, strings
        self.disconnected, self.found = disconnected, False

    def __call__(self, input_ids, scores, **kwargs):
        if self.strings:
            text = self.tokenizer.decode(input_ids[0, self.prompt_tokens :], skip_special_tokens=True)
            self.found = any(string in text for string in self.strings)
        return torch.full((1,), self.found or self.disconnected.is_set(), device=input_ids.device)


@dataclass
class Answer:
    """An answer without its text.

    Args:
        finish_reason: "stop" or "length".
        prompt_tokens: length of the prompt, dropped visual tokens included.
        completion_tokens: length of the answer, the end token included.
        qgsa: visual tokens and tiles in use, see `Answerer.describe`; None without images.
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
    """Answers requests in its own threads, `limits.concurrency` at a time and in order of arrival.

    Args:
        model: the model, in evaluation mode.
        processor: the processor of the same checkpoint.
        limits: limits of a request.
        pair: the model and its guide, if it has one.

    Raises ValueError if the chat template does not work.
    """

    def __init__(
        self,
        model: QGSASmolVLMForConditionalGeneration,
        processor: QGSAProcessor,
        limits: Limits,
        pair: GuidedVLM | None = None,
    ):
        self.model, self.processor, self.limits, self.pair = model, processor, limits, pair
        self.name = model.name_or_path
        self.threads = ThreadPoolExecutor(limits.concurrency)
        self.places = threading.Semaphore(limits.concurrency + limits.max_waiting)
        self.arrivals = Places(limits.concurrency + limits.max_waiting)
        self.parser = ThreadPoolExecutor(1)  # off the event loop, and not behind slow lookups of hosts
        self.context = model.config.text_config.max_position_embeddings
        self.markers = list(processor.tokenizer.get_added_vocab())
        self.max_characters = self.context * max(map(len, processor.tokenizer.get_vocab()))
        self.template = ChatTemplate(processor, limits.concurrency, self.max_characters)
        self.images = ImageReader(limits)

    def check(self, chat: ChatRequest):
        """Raise RequestError for errors that show before any image is loaded."""
        if chat.model not in (None, self.name):
            message = f"model ({reprlib.repr(chat.model)}) is not served here: use {self.name!r}"
            raise RequestError(message, "model", status=404, code="model_not_found")
        try:
            self.budget(chat)
        except ValueError as error:
            raise RequestError(f"qgsa: {error}", "qgsa") from error
        given = chat.qgsa.model_dump(exclude_none=True)
        if self.pair is not None and given:
            raise RequestError(f"qgsa ({', '.join(given)}): the guide of this server decides what is seen", "qgsa")
        check_limits(chat, self.limits, self.markers, self.max_characters)

    def budget(self, chat: ChatRequest) -> Budget:
        """The budget of a request. Raises ValueError if it is out of range, or its schedule does not fit the model."""
        given = chat.qgsa.model_dump()
        vision_budget = given.pop("vision_budget")
        schedule_of(self.model.config, vision_budget)
        budget = Budget.of(self.model.config, **given)
        if budget.selection == "dense" and vision_budget is not None:
            raise ValueError(f'vision_budget ({vision_budget}): not available with selection "dense"')
        return budget

    def start(
        self, chat: ChatRequest, images: list[Encoded], streamer, disconnected: threading.Event
    ) -> asyncio.Future:
        """Queue a request: its text goes to `streamer`, and the future resolves to its `Answer`.

        Setting `disconnected` stops it. Raises RequestError (503) if the queue is full.
        """
        if not self.places.acquire(blocking=False):
            message = f"queue full ({self.limits.max_waiting} waiting requests): try again later"
            raise RequestError(message, status=503, code="overloaded")
        future = self.threads.submit(self.answer, chat, images, streamer, disconnected)
        future.add_done_callback(lambda _: self.places.release())
        return asyncio.wrap_future(future)

    def answer(self, chat: ChatRequest, images: list[Encoded], streamer, disconnected: threading.Event) -> Answer:
        """Answer a request, in a thread. Raises RequestError if the images or the prompt are invalid."""
        try:
            if disconnected.is_set():
                raise RequestError("client disconnected", status=499)
            started = time.perf_counter()
            inputs = self.prepare(chat, images)
            prompt_tokens = inputs["input_ids"].shape[1]
            options = self.options(chat, prompt_tokens)
            stop = StopWhen(self.processor.tokenizer, prompt_tokens, chat.stop, disconnected)
            if chat.seed is not None:
                torch.manual_seed(chat.seed)
            output = (self.model if self.pair is None else self.pair).generate(
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
                qgsa |= {} if self.pair is None else self.describe_guide(qgsa, output)
                qgsa["seconds"] = time.perf_counter() - started
            return Answer("stop" if ended else "length", prompt_tokens, len(new), qgsa)
        finally:
            streamer.end()

    def prepare(self, chat: ChatRequest, images: list[Encoded]) -> BatchFeature:
        """Inputs of the model. Raises RequestError if the images or the prompt are invalid."""
        text = self.template.apply(chat.turns())
        decoded = self.images.decode(images)
        lazy = self.budget(chat).selection != "dense"
        try:
            inputs = self.processor(
                text=[text], images=[decoded] if images else None, return_tensors="pt", lazy_tiles=lazy
            )
        except ValueError as error:  # such as an image one pixel high
            raise RequestError(f"messages: {error}", "messages") from error
        return inputs.to(self.model.device)

    def options(self, chat: ChatRequest, prompt_tokens: int) -> dict:
        """Keyword arguments of `generate`. Raises RequestError if prompt and answer exceed the context."""
        asked = chat.max_completion_tokens or chat.max_tokens
        left = self.context - prompt_tokens
        if left < (asked or 1):
            message = (
                f"messages: {prompt_tokens} prompt tokens and {asked or 1} answer tokens exceed the model's "
                f"context of {self.context}"
            )
            raise RequestError(message, "messages", code="context_length_exceeded")
        options = {"max_new_tokens": asked or min(self.limits.max_new_tokens, left)}
        if chat.samples:
            options |= {"do_sample": True, "temperature": chat.temperature, "top_p": chat.top_p, "top_k": 0}
        else:
            options["do_sample"] = False
        return options | chat.qgsa.model_dump(exclude_none=True)

    def describe(self, input_ids: torch.LongTensor, selection) -> dict:
        """Cost of each image, `input_ids` being `(1, L)`; everything counts without a `selection`.

        Returns visual_tokens (kept) and tiles (encoded at high resolution), each also for "dense", one number per
        image; and vision_share, the share of the text model's work on visual tokens that its layers do.
        """
        config = self.model.config
        layout = VisualLayout.of(config, input_ids)
        tiles = [rows * columns for rows, columns in layout.grids.tolist()]
        tokens = [(count + 1) * config.tokens_per_tile for count in tiles]
        described = {"visual_tokens": tokens, "visual_tokens_dense": tokens, "tiles": tiles, "tiles_dense": tiles}
        described["vision_share"] = 1.0
        if selection is not None:
            kept = selection.kept_tokens[0].split(tokens)
            encoded = selection.kept_tiles[0].split([count + 1 for count in tiles])
            described["visual_tokens"] = [int(image.sum()) for image in kept]
            described["tiles"] = [int(image[:-1].sum()) for image in encoded]  # the last is the global view
            described["vision_share"] = round(float(selection.vision_share[0]), 4)
        return described

    def close(self):
        """End the workers, and all threads that have no answer to finish."""
        self.images.close()
        self.template.close()
        for threads in (self.threads, self.parser):
            threads.shutdown(wait=False)

    @staticmethod
    def describe_guide(qgsa: dict, output: GuidedOutput) -> dict:
        """Which of two models answered, and how sure the guide was; the target saw nothing if the guide answered."""
        assert output.answered_by_guide is not None and output.confidence is not None
        alone, confidence = bool(output.answered_by_guide[0]), float(output.confidence[0])
        described = {"answered_by": "guide" if alone else "target", "confidence": confidence}
        return described | ({name: [0] * len(qgsa[name]) for name in ("visual_tokens", "tiles")} if alone else {})


def end_of_answer(text: str, stops: list[str], complete: bool) -> int:
    """Length of the text that can be sent: up to the first stop string, or to the possible beginning of one."""
    found = [text.index(stop) for stop in stops if stop in text]
    if found or complete:
        return min(found, default=len(text))
    return len(text) - max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


async def cut(pieces: AsyncIterator[str], stops: list[str]) -> AsyncIterator[str]:
    """Pieces of a text up to the first stop string, without the leading space that the template leaves."""
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


async def watch(request: Request, disconnected: threading.Event):
    """Set `disconnected` once the client has disconnected."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)
    disconnected.set()


async def respond(request: Request, answerer: Answerer) -> JSONResponse | StreamingResponse:
    """Answer a chat completion. Raises RequestError, when streaming only before the first piece."""
    with answerer.arrivals.take(request.client.host if request.client else ""):
        in_thread = asyncio.get_running_loop().run_in_executor
        chat = await in_thread(answerer.parser, parse, await read_body(request, answerer.limits.max_bytes))
        answerer.check(chat)
        images = await answerer.images.load(chat)

    disconnected = threading.Event()
    tokenizer = answerer.processor.tokenizer
    streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = answerer.start(chat, images, streamer, disconnected)
    watching = asyncio.create_task(watch(request, disconnected))
    answer.add_done_callback(lambda _: watching.cancel())

    pieces = cut(streamer, chat.stop)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": answerer.name}
    if chat.stream:
        first = await anext(pieces, None)
        if first is None:
            await answer  # raises before the response has begun
        return StreamingResponse(events(chat, head, first, pieces, answer), media_type="text/event-stream")
    text = "".join([piece async for piece in pieces])
    done = await answer
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": done.finish_reason}
    return JSONResponse(
        {**head, "object": "chat.completion", "choices": [choice], "usage": done.usage, "qgsa": done.qgsa}
    )


async def events(chat: ChatRequest, head: dict, first: str | None, pieces, answer) -> AsyncIterator[str]:
    """Answer as server-sent events."""

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


def error_response(request: Request, error: Exception) -> JSONResponse:
    """Error in OpenAI's format; unexpected errors reveal no details."""
    if isinstance(error, HTTPException):
        error = RequestError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
    elif isinstance(error, ClientDisconnect):
        error = RequestError("client disconnected", status=499)
    elif not isinstance(error, RequestError):
        error = INTERNAL
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse(error_body(error), error.status, headers)


def make_app(
    model: QGSASmolVLMForConditionalGeneration, processor: QGSAProcessor, limits: Limits, pair: GuidedVLM | None = None
) -> FastAPI:
    """Server as an ASGI application; arguments as in `Answerer`."""
    answerer, started = Answerer(model, processor, limits, pair), int(time.time())
    handled = (RequestError, HTTPException, ClientDisconnect, Exception)

    @asynccontextmanager
    async def lifespan(_):
        yield
        answerer.close()

    app = FastAPI(openapi_url=None, lifespan=lifespan, exception_handlers=dict.fromkeys(handled, error_response))

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
    with errors_in_one_line():
        run = parse_arguments(ServeArguments, __doc__)
        model, processor, pair = load_served(run)
        app = make_app(model.tune(), processor, run, pair)
    uvicorn.run(app, host=run.host, port=run.port, **OPTIONS)


if __name__ == "__main__":
    main()
