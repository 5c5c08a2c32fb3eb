"""Batches: requests that are ready when the model gets free are answered together.

A request is a `Job`. Its images and its prompt are read in a few threads, ahead of the model, which runs in a thread
of its own. A batch is static: it ends when each of its rows has what was asked for, and then the next one begins. Its
rows share one call of `generate`, and so they have their `group` in common: budgets and sampling options.
"""

import logging
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from serve_errors import RequestError, closing, disconnected
from serve_images import READERS, Encoded
from serve_requests import ChatRequest
from torch.nn.utils.rnn import pad_sequence
from transformers import AsyncTextIteratorStreamer, StoppingCriteria

from modeling_qgsa.tiles_qgsa import LazyTiles


logger = logging.getLogger("uvicorn.error")  # shown by default

SECONDS_TO_END = 5  # for a step of the model that is in progress when the server closes


@dataclass(frozen=True)
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


@dataclass(eq=False)
class Job:
    """A request on its way to its answer: its text goes to `streamer`, and `future` resolves to its `Answer`.

    Args:
        chat: the request.
        images: its images, not decoded yet.
        streamer: takes the new tokens.
        group: requests with the same one may share a batch.
        arrived: when its head was received, as the following seconds by `time.perf_counter`.
        ends: ids of the tokens that end an answer.
        disconnected: set when the client has disconnected, which stops it.
        inputs: inputs of the model, once they are read, with `max_new_tokens` that the request may get.
        queued, taken: when it was received, and when the model took it.
        reading: seconds that it took to read its inputs.
        first_token: when its first token came.
        tokens: the answer so far.
        finish_reason: as in an `Answer`, once the answer is complete.
        qgsa: as in an `Answer`.
    """

    chat: ChatRequest
    images: list[Encoded]
    streamer: AsyncTextIteratorStreamer
    group: Any
    arrived: float
    ends: frozenset[int]
    disconnected: threading.Event = field(default_factory=threading.Event)
    future: Future = field(default_factory=Future)
    inputs: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 0
    queued: float = field(default_factory=time.perf_counter)
    taken: float = 0.0
    reading: float = 0.0
    first_token: float = 0.0
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    qgsa: dict | None = None

    @property
    def done(self) -> bool:
        """Whether it needs no more tokens."""
        return self.finish_reason is not None or self.disconnected.is_set()

    @property
    def prompt_tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]

    def put(self, token: int):
        """Take a token of the answer, and find out whether it is complete."""
        self.first_token = self.first_token or time.perf_counter()
        self.tokens.append(token)
        self.streamer.put(torch.tensor([token]))
        if token in self.ends or self.found_stop():
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_new_tokens:
            self.finish_reason = "length"

    def found_stop(self) -> bool:
        """Whether one of the request's stop strings is in the answer."""
        if not self.chat.stop:
            return False
        text = self.streamer.tokenizer.decode(self.tokens, skip_special_tokens=True)
        return any(string in text for string in self.chat.stop)

    def finish(self):
        """Resolve to the answer."""
        if self.qgsa is not None:
            self.qgsa["seconds"] = self.reading + time.perf_counter() - self.taken
        reason = self.finish_reason or "length"
        self.resolve(self.future.set_result, Answer(reason, self.prompt_tokens, len(self.tokens), self.qgsa))

    def fail(self, error: Exception):
        """Resolve to an error, unless there is an answer."""
        self.resolve(self.future.set_exception, error)

    def resolve(self, settle: Callable, result):
        try:
            settle(result)
        except InvalidStateError:  # answered, abandoned or cancelled
            return
        self.streamer.end()


class Rows(StoppingCriteria):
    """Hands each new token to the job of its row, and stops the rows that are done.

    Args:
        jobs: one per row.
        on_token: called with each job after its token.
    """

    def __init__(self, jobs: list[Job], on_token: Callable[[Job], None]):
        self.jobs, self.on_token = jobs, on_token

    def __call__(self, input_ids, scores, **kwargs):
        for job, token in zip(self.jobs, input_ids[:, -1].tolist()):
            if not job.done:
                job.put(token)
                self.on_token(job)
        return torch.tensor([job.done for job in self.jobs], device=input_ids.device)


def collate(rows: list[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Inputs of several samples as one batch, padded on the left; the tiles of samples with fewer are zeros."""
    batch: dict[str, Any] = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if name == "lazy_tiles":
            batch[name] = LazyTiles.join(values)
        elif first.dim() == 2:
            padding = pad_token_id if name == "input_ids" else 0
            values = [value[0] for value in values]
            batch[name] = pad_sequence(values, batch_first=True, padding_value=padding, padding_side="left")
        else:
            batch[name] = pad_sequence([value[0] for value in values], batch_first=True)
    return batch


class Batches:
    """Reads jobs in a few threads and runs them in one, in batches and in the order in which they get ready.

    The first job is never passed over: others join it if they are of its group.

    Args:
        read: reads the inputs of a job. Its errors go to the job.
        run: runs a batch, whose jobs it finishes. If it fails, jobs without any token run again, one by one, so that
            none suffers from another one; the others get the error.
        size: most jobs in a batch.
        most_images: most images in a batch of several jobs; also how many are read ahead, and then those of one job.
        places: most jobs that run and wait.
    """

    def __init__(
        self,
        read: Callable[[Job], None],
        run: Callable[[list[Job]], None],
        size: int,
        most_images: int,
        places: int,
    ):
        self.read, self.run, self.size, self.most_images, self.places = read, run, size, most_images, places
        self.open: set[Job] = set()  # without an answer
        self.ready: list[Job] = []
        self.ahead = 0  # images of jobs that are being read or ready
        self.closed, self.changed = False, threading.Condition()
        self.readers = ThreadPoolExecutor(READERS)
        self.thread = threading.Thread(target=self.serve, daemon=True)  # a step of the model cannot be interrupted
        self.thread.start()

    @property
    def waiting(self) -> int:
        """Number of jobs that the model has not taken."""
        return sum(not job.taken for job in list(self.open))

    def add(self, job: Job):
        """Take a job on. Raises RequestError (503) if all places are taken by clients that still wait."""
        with self.changed:
            for each in list(self.open):
                if each.disconnected.is_set() and not each.taken:
                    each.fail(disconnected())
            if len(self.open) >= self.places:
                message = f"queue full ({self.places} requests run or wait): try again later"
                raise RequestError(message, status=503, code="overloaded")
            self.open.add(job)
        job.future.add_done_callback(lambda _: self.open.discard(job))
        self.readers.submit(self.prepare, job)

    def prepare(self, job: Job):
        """Read a job, in a thread, as soon as few enough images are read ahead of the model."""
        images = len(job.images)
        if job.future.done() or not job.future.set_running_or_notify_cancel():
            return
        with self.changed:
            self.changed.wait_for(lambda: self.closed or not images or self.ahead < self.most_images)
            self.ahead += images
        try:
            if job.disconnected.is_set():
                raise disconnected()
            began = time.perf_counter()
            self.read(job)
            job.reading = time.perf_counter() - began
        except Exception as error:
            job.fail(error)
        with self.changed:
            if job.future.done():
                self.ahead -= images
            else:
                self.ready.append(job)
            self.changed.notify_all()

    def take(self) -> list[Job]:
        """Wait for jobs and take a batch of them; empty if the server closes."""
        batch: list[Job] = []
        with self.changed:
            while not batch:
                self.changed.wait_for(lambda: self.closed or self.ready)
                if self.closed:
                    return []
                for job in self.ready:
                    if job.disconnected.is_set():
                        job.fail(disconnected())
                batch = self.choose()
                left = [job for job in self.ready if job not in batch and not job.future.done()]
                self.ahead -= sum(len(job.images) for job in self.ready) - sum(len(job.images) for job in left)
                self.ready = left
                self.changed.notify_all()
        return batch

    def choose(self) -> list[Job]:
        """The first job that is ready, and those that join it."""
        batch: list[Job] = []
        images = 0
        for job in self.ready:
            fits = len(batch) < self.size and images + len(job.images) <= self.most_images
            if not job.future.done() and (not batch or (fits and job.group == batch[0].group)):
                batch.append(job)
                images += len(job.images)
        return batch

    def serve(self):
        """Answer batches until the server closes; in a thread of its own."""
        while batch := self.take():
            self.answer(batch)

    def answer(self, jobs: list[Job]):
        """Answer a batch, and each job on its own if that fails."""
        for job in jobs:
            job.taken = time.perf_counter()
        try:
            self.run(jobs)
        except Exception as error:
            if len(jobs) > 1:
                logger.warning("a batch of %d requests failed (%s): answering them one by one", len(jobs), repr(error))
                traceback.clear_frames(error.__traceback__)  # which would hold the memory that was too little
            for job in jobs if len(jobs) > 1 else []:
                if not job.tokens:
                    self.answer([job])
            for job in jobs:
                job.fail(error)
        for job in jobs:
            job.fail(disconnected())  # where there is no answer
            job.inputs = {}  # the pixels go, while the response is still being sent

    def abandon(self, error: Exception):
        """End all jobs with an error, those that run at their next token."""
        with self.changed:
            for job in list(self.open):
                job.disconnected.set()
                job.fail(error)

    def close(self):
        """End the threads, whatever they do."""
        self.abandon(closing())
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.readers.shutdown(wait=False, cancel_futures=True)
        self.thread.join(SECONDS_TO_END)
