"""Chat-completion requests: fields and limits."""

import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, create_model, model_validator
from serve_errors import RequestError

from modeling_qgsa.configuration_qgsa import Budget


# Defaults that clients send explicitly although they change nothing.
DEFAULTS = {"n": 1, "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0}


@dataclass
class Limits:
    """Limits of a request. Raises ValueError, naming field and value, if a limit is too low."""

    max_request_mb: float = field(default=20, metadata={"help": "MB of the request body, and of all fetched images."})
    max_images: int = field(default=8, metadata={"help": "Images per request."})
    max_pixels: int = field(default=50_000_000, metadata={"help": "Pixels per request, over all images."})
    max_image_seconds: float = field(
        default=10, metadata={"help": "Seconds per request to decode all images, and a fifth of it for their headers."}
    )
    max_new_tokens: int = field(default=512, metadata={"help": "Tokens per answer; also the default."})
    max_batch_size: int = field(
        default=8, metadata={"help": "Most answers generated together; with a guide it is one at a time."}
    )
    max_waiting: int = field(default=16, metadata={"help": "Requests that may wait besides; the next one gets a 503."})
    allow_urls: bool = field(
        default=False, metadata={"help": "Fetch images from http(s) URLs (public addresses only)."}
    )

    def __post_init__(self):
        minimum = {"max_pixels": 1, "max_new_tokens": 1, "max_batch_size": 1, "max_images": 0, "max_waiting": 0}
        for name, number in minimum.items():
            if getattr(self, name) < number:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {number}")
        for name in ("max_request_mb", "max_image_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be above 0")

    @property
    def max_bytes(self) -> int:
        return int(self.max_request_mb * 1e6)


class Fields(BaseModel):
    """Strictly typed fields, no others; null counts as absent. Only the first unknown field is reported."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def simplify_fields(cls, given):
        if not isinstance(given, dict):
            return given
        fields = {name: value for name, value in given.items() if value is not None}
        known = {name: fields[name] for name in fields.keys() & cls.model_fields.keys()}
        unknown = next((name for name in fields if name not in known), None)
        return known if unknown is None else {**known, unknown: fields[unknown]}


class ImageURL(Fields):
    url: str
    detail: Literal["auto"] = "auto"  # the budgets in `qgsa` are finer


class Part(Fields):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageURL | None = None

    @model_validator(mode="after")
    def check_type(self):
        for name in ("text", "image_url"):
            if (getattr(self, name) is None) == (name == self.type):
                rule = "is required" if name == self.type else "is not allowed"
                raise ValueError(f"{name} {rule} in a part of type {self.type!r}")
        return self


class Message(Fields):
    role: Literal["system", "user", "assistant"]
    content: Annotated[list[Part], FailFast()] = Field(min_length=1, max_length=100)
    name: str | None = None  # ignored: the template has no names

    @model_validator(mode="before")
    @classmethod
    def spread_text(cls, given):
        if isinstance(given, dict) and isinstance(given.get("content"), str):
            return {**given, "content": [{"type": "text", "text": given["content"]}]}
        return given

    @model_validator(mode="after")
    def check_images(self):
        if self.role != "user" and any(part.image_url for part in self.content):
            raise ValueError(f"role ({self.role!r}) must be 'user' in a message with images")
        return self


QGSAOptions = create_model(
    "QGSAOptions",
    __base__=Fields,
    __doc__="Budget of one request, as the keyword arguments of `generate`; the model checks the values.",
    vision_budget=(float | Annotated[str, Field(max_length=1000)] | None, None),
    max_image_tokens=(int | None, None),
    **{name: (kind | None, None) for name, kind in get_type_hints(Budget).items()},
)


class StreamOptions(Fields):
    include_usage: bool = False


class ChatRequest(Fields):
    """A request to `/v1/chat/completions`.

    Decoding is greedy without `temperature` or with a temperature below 0.01, whatever `top_p` says. The same `seed`
    repeats a sampled answer.
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
    user: str | None = None  # ignored
    qgsa: QGSAOptions = QGSAOptions()

    @model_validator(mode="before")
    @classmethod
    def simplify(cls, given):
        if not isinstance(given, dict):
            return given
        given = {k: v for k, v in given.items() if k not in DEFAULTS or v != DEFAULTS[k]}
        return {**given, "stop": [given["stop"]]} if isinstance(given.get("stop"), str) else given

    @property
    def samples(self) -> bool:
        return self.temperature >= 0.01

    @property
    def image_urls(self) -> Iterator[tuple[str, str]]:
        """Field name and URL of each image."""
        for m, message in enumerate(self.messages):
            for p, part in enumerate(message.content):
                if part.image_url is not None:
                    yield f"messages.{m}.content.{p}.image_url.url", part.image_url.url

    def turns(self) -> list[dict]:
        """Messages in the form of the chat template, adjacent text parts joined."""
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
    """Parse a request. Raises RequestError, naming the first invalid field."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False)[0]
    where = ".".join(map(str, error["loc"]))[:200] or None
    prefix = f"{where}: " if where else ""
    if error["type"] == "extra_forbidden":
        raise RequestError(f"{prefix}not supported by this server", where)
    given = error["input"]
    shown = f", not {reprlib.repr(given)}" if where and not isinstance(given, dict | list | BaseModel) else ""
    raise RequestError(f"{prefix}{error['msg'].removeprefix('Value error, ')}{shown}", where)


def check_limits(chat: ChatRequest, limits: Limits, markers: list[str], max_characters: int):
    """Raise RequestError if the request exceeds a limit or its text contains special tokens.

    Args:
        markers: special tokens, such as the image placeholder, which the tokenizer would not read as text.
        max_characters: upper bound of the characters that fit into the model's context.
    """
    for name in ("max_completion_tokens", "max_tokens"):
        asked = getattr(chat, name)
        if asked is not None and asked > limits.max_new_tokens:
            raise RequestError(f"{name} ({asked}) must be at most {limits.max_new_tokens} on this server", name)
    images = len(list(chat.image_urls))
    if images > limits.max_images:
        raise RequestError(f"messages: {images} images exceed the limit of {limits.max_images}", "messages")

    characters = sum(len(part.text or "") for message in chat.messages for part in message.content)
    if characters > max_characters:
        raise RequestError(
            f"messages: {characters} characters exceed the {max_characters} that fit into the model's context",
            "messages",
            code="context_length_exceeded",
        )
    for m, turn in enumerate(chat.turns()):
        where = f"messages.{m}.content"
        for text in (part["text"] for part in turn["content"] if part["type"] == "text"):
            for marker in (marker for marker in markers if marker in text):
                raise RequestError(f"{where}: the text must not contain special tokens: remove {marker!r}", where)
