"""What a chat-completion request may say: its fields, its limits, and how it is refused."""

import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator


# What clients send of OpenAI's other fields although it asks for nothing.
WITHOUT_EFFECT = {"n": 1, "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0}


@dataclass
class Limits:
    """What a request may cost. Raises ValueError for a number below its least, naming both."""

    max_request_mb: float = field(
        default=20, metadata={"help": "Most MB of a request's body, and of what its URLs are fetched from."}
    )
    max_images: int = field(default=8, metadata={"help": "Most images of a request."})
    max_pixels: int = field(default=50_000_000, metadata={"help": "Most pixels of a request, of all its images."})
    max_new_tokens: int = field(default=512, metadata={"help": "Most tokens of an answer, whether asked for or not."})
    concurrency: int = field(default=1, metadata={"help": "Answers made at the same time."})
    max_waiting: int = field(default=16, metadata={"help": "Most requests that wait; the next one gets a 503."})
    allow_urls: bool = field(
        default=False, metadata={"help": "Fetch images from http(s) URLs, at public addresses only."}
    )

    def __post_init__(self):
        least = {"max_pixels": 1, "max_new_tokens": 1, "concurrency": 1, "max_images": 0, "max_waiting": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"{name} is {getattr(self, name)}: it has to be at least {number}")
        if not self.max_request_mb > 0:
            raise ValueError(f"max_request_mb is {self.max_request_mb}: it has to be above 0")

    @property
    def max_bytes(self) -> int:
        return int(self.max_request_mb * 1e6)


class RequestError(Exception):
    """A refusal that the client is told of, in OpenAI's form.

    Args:
        message: what is wrong, with the numbers.
        param: the field it is about, such as `messages.0.content`.
        status: of the HTTP response.
        code: OpenAI's name of the error, for programs.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


INTERNAL = RequestError("the server failed: its log says more", status=500)


def error_body(error: RequestError) -> dict:
    """An error as OpenAI writes it."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


class Fields(BaseModel):
    """Fields of their exact types, and no others; null is as good as absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_null(cls, given):
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class ImageURL(Fields):
    url: str
    detail: Literal["auto"] = "auto"  # the budgets of `qgsa` say more


class Part(Fields):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageURL | None = None

    @model_validator(mode="after")
    def check_type(self):
        for name in ("text", "image_url"):
            if (getattr(self, name) is None) == (name == self.type):
                raise ValueError(f"type is {self.type!r}, {name} is {'missing' if name == self.type else 'there'}")
        return self


class Message(Fields):
    role: Literal["system", "user", "assistant"]
    content: Annotated[list[Part], FailFast()] = Field(min_length=1, max_length=100)
    name: str | None = None  # without effect: the template has no names

    @model_validator(mode="before")
    @classmethod
    def spread_text(cls, given):
        if isinstance(given, dict) and isinstance(given.get("content"), str):
            return {**given, "content": [{"type": "text", "text": given["content"]}]}
        return given

    @model_validator(mode="after")
    def check_images(self):
        if self.role != "user" and any(part.image_url for part in self.content):
            raise ValueError(f"images are for the user, not for the {self.role}")
        return self


class QGSAOptions(Fields):
    """Overrides of the model's budgets, as in `generate`; checked by the model."""

    selection: str | None = None
    min_visual_tokens: int | None = Field(None, le=10**6)
    max_visual_tokens: int | None = Field(None, le=10**6)
    min_tiles: int | None = Field(None, le=10**6)
    max_tiles: int | None = Field(None, le=10**6)


class StreamOptions(Fields):
    include_usage: bool = False


class ChatRequest(Fields):
    """A request to `/v1/chat/completions`.

    Without `temperature`, or below 0.01, each token is the most likely one, whatever `top_p`. The same `seed` samples
    the same answer again.
    """

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1, max_length=1000)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0, ge=0, le=2)
    top_p: float = Field(1, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field([], max_length=4)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None  # without effect
    qgsa: QGSAOptions = QGSAOptions()

    @model_validator(mode="before")
    @classmethod
    def simplify(cls, given):
        if not isinstance(given, dict):
            return given
        given = {k: v for k, v in given.items() if k not in WITHOUT_EFFECT or v != WITHOUT_EFFECT[k]}
        return {**given, "stop": [given["stop"]]} if isinstance(given.get("stop"), str) else given

    @property
    def samples(self) -> bool:
        return self.temperature >= 0.01

    @property
    def image_urls(self) -> Iterator[tuple[str, str]]:
        """Where each image is, with the name of its field."""
        for m, message in enumerate(self.messages):
            for p, part in enumerate(message.content):
                if part.image_url is not None:
                    yield f"messages.{m}.content.{p}.image_url.url", part.image_url.url

    def turns(self) -> list[dict]:
        """The messages as the chat template takes them; text that no image parts is one piece."""
        turns = []
        for message in self.messages:
            parts = []
            for part in message.content:
                if part.type == "image_url":
                    parts.append({"type": "image"})
                elif parts and parts[-1]["type"] == "text":
                    parts[-1] = {"type": "text", "text": parts[-1]["text"] + part.text}
                else:
                    parts.append({"type": "text", "text": part.text})
            turns.append({"role": message.role, "content": parts})
        return turns


def parse(body: bytes) -> ChatRequest:
    """Read a request. Raises RequestError, naming the first field that is wrong."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False)[0]
    where = ".".join(map(str, error["loc"]))[:200] or None
    what = f"{where}: " if where else ""
    if error["type"] == "extra_forbidden":
        raise RequestError(f"{what}this server does not support it", where)
    given = error["input"]
    shown = f", not {reprlib.repr(given)}" if where and not isinstance(given, dict | list | BaseModel) else ""
    raise RequestError(f"{what}{error['msg'].removeprefix('Value error, ')}{shown}", where)


def check_limits(chat: ChatRequest, limits: Limits, markers: list[str], max_characters: int):
    """Raise RequestError unless the request is within the limits and its text is text.

    Args:
        markers: strings that stand for special tokens, such as the placeholder of images: text that held them would
            reach the model as something else.
        max_characters: more cannot fit into the model's context.
    """
    for name in ("max_completion_tokens", "max_tokens"):
        asked = getattr(chat, name)
        if asked is not None and asked > limits.max_new_tokens:
            raise RequestError(f"{name} is {asked}: this server makes at most {limits.max_new_tokens}", name)
    if chat.seed is not None and chat.samples and limits.concurrency > 1:
        raise RequestError(f"seed: this server makes {limits.concurrency} answers at once, only one repeats", "seed")
    images = len(list(chat.image_urls))
    if images > limits.max_images:
        raise RequestError(f"messages: {images} images, at most {limits.max_images} are allowed", "messages")

    characters = sum(len(part.text or "") for message in chat.messages for part in message.content)
    if characters > max_characters:
        raise RequestError(
            f"messages: {characters} characters, the model's context holds at most {max_characters}",
            "messages",
            code="context_length_exceeded",
        )
    for m, turn in enumerate(chat.turns()):
        where = f"messages.{m}.content"
        for text in (part["text"] for part in turn["content"] if part["type"] == "text"):
            for marker in (marker for marker in markers if marker in text):
                raise RequestError(f"{where}: the text holds {marker!r}, which is a special token", where)
