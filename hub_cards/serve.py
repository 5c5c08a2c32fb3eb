"""Serve a QGSA-SmolVLM checkpoint to OpenAI clients.

    python hub_cards/serve.py --model outputs/demo
    python hub_cards/serve.py --model outputs/demo --guide outputs/small_one
    python hub_cards/serve.py --model outputs/guided/pair

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="outputs/demo", messages=[...], extra_body={"qgsa": {"max_tiles": 2}})

Routes: `POST /v1/chat/completions` (streaming too), `GET /v1/models`, `GET /health` and `GET /metrics` (Prometheus).
`qgsa` in a request takes the budgets of `generate` and `vision_budget`; in a response it has the number of visual
tokens and tiles in use, the share of the text model's work on them, and which of two models answered. Requests that
wait together are answered in batches. At its start the server measures with which precision, steps and threads the
encoder is fastest, and sets them (`model.tune()`); `--tuning tuning.json` keeps what it found for the next start. On
SIGTERM or SIGINT it answers what it has taken, and refuses new requests.

Neither code nor pickles of a checkpoint are run; its chat template is, and images are read, by processes with bounds
on time and memory. With an API key all routes but `/health` ask for it. The key travels in clear: beyond loopback, put
a proxy with TLS in front.

`transformers serve` cannot serve this model: it finds models in tables that `register` calls do not reach, and it has
no limits on images and URLs and no additional response fields.
"""

import asyncio
import json
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from serve_answers import Answerer
from serve_checkpoints import load, load_pair
from serve_connections import KEY, OPTIONS, check_key, read_body
from serve_errors import HANDLERS, RequestError, error_body, internal
from serve_requests import ChatRequest, Limits, parse
from serve_shutdown import Gate, Server
from transformers import AsyncTextIteratorStreamer

from modeling_qgsa import GuidedVLM, QGSAProcessor, QGSASmolVLMForConditionalGeneration
from training.cli.arguments import errors_in_one_line
from training.cli.arguments import parse as parse_arguments


@dataclass
class ServedArguments(Limits):
    """Model, key and limits of a server."""

    model: str = field(default="hub_cards/tiny-qgsa", metadata={"help": "QGSA checkpoint: Hub id or folder."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cpu or cuda."})
    guide: str | None = field(
        default=None, metadata={"help": "Small QGSA checkpoint that tells the model where to look."}
    )
    tuning: str | None = field(
        default=None,
        metadata={"help": "File for what is fastest here: read if it exists, else measured and written."},
    )
    api_key: str | None = field(
        default=None,
        repr=False,
        metadata={"help": f"Key that clients must send. In {KEY} it does not show in the list of processes."},
    )
    shutdown_timeout: float = field(
        default=20, metadata={"help": "Seconds for requests that were taken before SIGTERM or SIGINT."}
    )

    def __post_init__(self):
        super().__post_init__()
        # Taken out, so that the workers, which run what others wrote, do not inherit it.
        found = os.environ.pop(KEY, None)
        self.api_key = found if self.api_key is None else self.api_key
        if self.api_key is not None and not re.fullmatch("[!-~]+", self.api_key):
            raise ValueError("api_key must be printable ASCII characters without spaces")
        if not self.shutdown_timeout >= 0:
            raise ValueError(f"shutdown_timeout ({self.shutdown_timeout}) must be at least 0")


@dataclass
class ServeArguments(ServedArguments):
    """Model, key, limits and address of the server."""

    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 for all."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})


def load_served(run: ServedArguments):
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


async def watch(request: Request, gone: threading.Event):
    """Set `gone` once the client has disconnected."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)
    gone.set()


async def respond(request: Request, answerer: Answerer) -> JSONResponse | StreamingResponse:
    """Answer a chat completion. Raises RequestError, when streaming only before the first piece."""
    arrived = time.perf_counter()
    async with answerer.arrivals.take(request):
        in_thread = asyncio.get_running_loop().run_in_executor
        chat = await in_thread(answerer.parser, parse, await read_body(request, answerer.limits.max_bytes))
        answerer.check(chat)
        images = await answerer.images.load(chat)

    streamer = AsyncTextIteratorStreamer(answerer.processor.tokenizer, skip_special_tokens=True)
    job = answerer.start(chat, images, streamer, arrived)
    answer = asyncio.wrap_future(job.future)
    watching = asyncio.create_task(watch(request, job.disconnected))
    answer.add_done_callback(lambda _: watching.cancel())
    answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, also if nobody awaits it

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
    except RequestError as error:  # the server shuts down
        yield f"data: {json.dumps(error_body(error))}\n\n"
        return
    except Exception:
        yield f"data: {json.dumps(error_body(internal()))}\n\n"
        raise
    yield event({**delta({}, done.finish_reason), "qgsa": done.qgsa})
    if chat.stream_options.include_usage:
        yield event({"choices": [], "usage": done.usage})
    yield "data: [DONE]\n\n"


def make_app(
    model: QGSASmolVLMForConditionalGeneration,
    processor: QGSAProcessor,
    limits: Limits,
    pair: GuidedVLM | None = None,
    api_key: str | None = None,
) -> Gate:
    """Server as an ASGI application; arguments as in `Answerer`, and the key that all but `/health` asks for."""
    answerer, started = Answerer(model, processor, limits, pair), int(time.time())

    @asynccontextmanager
    async def lifespan(_):
        yield
        answerer.close()

    async def authorize(request: Request):
        check_key(request, api_key)

    app = FastAPI(openapi_url=None, lifespan=lifespan, exception_handlers=HANDLERS)
    gate, authorized = Gate(app, answerer), {"dependencies": [Depends(authorize)]}

    @app.get("/health")
    async def health():
        return JSONResponse({"status": "shutting down"}, 503) if gate.closing else {"status": "ok"}

    @app.get("/metrics", **authorized)
    async def metrics():
        return answerer.metrics.response()

    @app.get("/v1/models", **authorized)
    async def models():
        entry = {"id": answerer.name, "object": "model", "created": started, "owned_by": "qgsa"}
        return {"object": "list", "data": [entry]}

    @app.post("/v1/chat/completions", **authorized)
    async def chat_completions(request: Request):
        return await respond(request, answerer)

    return gate


def main():
    with errors_in_one_line():
        run = parse_arguments(ServeArguments, __doc__)
        model, processor, pair = load_served(run)
        gate = make_app(model.tune(saved=run.tuning), processor, run, pair, run.api_key)
    Server(gate, run.shutdown_timeout, host=run.host, port=run.port, **OPTIONS).run()
    if gate.answerer.batches.thread.is_alive():  # in a step of the model, which nothing can interrupt
        sys.stdout.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
