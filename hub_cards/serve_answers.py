"""Answers: from a request that was received to the tokens that the model generates."""

import reprlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch
from serve_batches import Batches, Job, Rows, collate
from serve_connections import Places
from serve_errors import RequestError
from serve_images import Encoded, ImageReader
from serve_metrics import Metrics
from serve_requests import ChatRequest, Limits, check_limits
from serve_templates import ChatTemplate
from transformers import AsyncTextIteratorStreamer, StoppingCriteriaList

from modeling_qgsa import GuidedVLM, QGSAProcessor, QGSASmolVLMForConditionalGeneration
from modeling_qgsa.cache_qgsa import Past
from modeling_qgsa.configuration_qgsa import Budget
from modeling_qgsa.guidance_qgsa import GuidedOutput
from modeling_qgsa.layout_qgsa import VisualLayout
from modeling_qgsa.request_qgsa import Request
from modeling_qgsa.schedule_qgsa import schedule_of


class Answerer:
    """Answers requests, those that are alike and wait together in one batch.

    Args:
        model: the model, in evaluation mode.
        processor: the processor of the same checkpoint.
        limits: limits of a request, and of a batch.
        pair: the model and its guide, if it has one; requests are then answered one at a time.

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
        self.parser = ThreadPoolExecutor(1)  # off the event loop, and not behind slow lookups of hosts
        self.context = model.config.text_config.max_position_embeddings
        self.markers = list(processor.tokenizer.get_added_vocab())
        self.max_characters = self.context * max(map(len, processor.tokenizer.get_vocab()))
        self.pad_token_id = processor.tokenizer.pad_token_id or 0  # hidden by the attention mask
        ends = model.generation_config.eos_token_id
        self.ends = frozenset(ends if isinstance(ends, list) else [ends])
        self.template = ChatTemplate(processor, 1, self.max_characters)
        self.images = ImageReader(limits)
        size = 1 if pair is not None else limits.max_batch_size
        places = size + limits.max_waiting
        self.arrivals = Places(places)
        self.batches = Batches(self.read, self.run, size, max(limits.max_images, size), places)
        self.metrics = Metrics()
        self.metrics.watch_queue(lambda: self.batches.waiting)

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

    def group(self, chat: ChatRequest, images: list[Encoded]):
        """What requests of one batch have in common: budgets and sampling. Equal to nothing else for one with a seed.

        A seed repeats an answer only if nobody else draws random numbers meanwhile.
        """
        if chat.samples and chat.seed is not None:
            return object()
        sampling = (chat.temperature, chat.top_p) if chat.samples else None
        return bool(images), sampling, self.budget(chat), chat.qgsa.vision_budget

    def start(
        self, chat: ChatRequest, images: list[Encoded], streamer: AsyncTextIteratorStreamer, arrived: float
    ) -> Job:
        """Take a request on; arguments as in `Job`. Raises RequestError (503) if the queue is full."""
        job = Job(chat, images, streamer, self.group(chat, images), arrived, self.ends)
        self.batches.add(job)
        return job

    def read(self, job: Job):
        """Make the inputs of the model, in a thread. Raises RequestError if the images or the prompt are invalid."""
        text = self.template.apply(job.chat.turns())
        decoded = self.images.decode(job.images)
        lazy = self.budget(job.chat).selection != "dense"
        try:
            inputs = self.processor(
                text=[text], images=[decoded] if decoded else None, return_tensors="pt", lazy_tiles=lazy
            )
        except ValueError as error:  # such as an image one pixel high
            raise RequestError(f"messages: {error}", "messages") from error
        job.inputs = dict(inputs)
        asked, left = job.chat.max_completion_tokens or job.chat.max_tokens, self.context - job.prompt_tokens
        if left < (asked or 1):
            message = (
                f"messages: {job.prompt_tokens} prompt tokens and {asked or 1} answer tokens exceed the model's "
                f"context of {self.context}"
            )
            raise RequestError(message, "messages", code="context_length_exceeded")
        job.max_new_tokens = asked or min(self.limits.max_new_tokens, left)

    def options(self, jobs: list[Job]) -> dict:
        """Keyword arguments of `generate` for a batch."""
        chat = jobs[0].chat
        options = {"do_sample": False}
        if chat.samples:
            options = {"do_sample": True, "temperature": chat.temperature, "top_p": chat.top_p, "top_k": 0}
        return options | {"max_new_tokens": max(job.max_new_tokens for job in jobs)}

    def run(self, jobs: list[Job]):
        """Answer a batch."""
        self.metrics.batch_size.observe(len(jobs))
        inputs = collate([job.inputs for job in jobs], self.pad_token_id)
        inputs = {
            name: value.to(self.model.device) if torch.is_tensor(value) else value for name, value in inputs.items()
        }
        options = self.options(jobs)
        if jobs[0].chat.seed is not None:
            torch.manual_seed(jobs[0].chat.seed)
        if self.pair is not None:
            self.run_pair(jobs[0], inputs, options)
            return
        criteria = StoppingCriteriaList([Rows(jobs, self.finish)])
        budget = asdict(self.budget(jobs[0].chat)) | {"vision_budget": jobs[0].chat.qgsa.vision_budget}
        with torch.no_grad():
            request = Request.take(self.model.config, {**inputs, **budget})
            prefill = self.model.model.prefill(request) if request.selects else None
            for row, job in enumerate(jobs):
                job.qgsa = self.describe(job, None if prefill is None else prefill.selection, row)
            if prefill is None:
                self.model.generate(**inputs, **options, **budget, stopping_criteria=criteria)
            else:
                past = Past.of(None, None)
                self.model.generate_from(prefill, inputs["input_ids"], past, **options, stopping_criteria=criteria)
        for job in jobs:
            self.end(job)

    def run_pair(self, job: Job, inputs: dict, options: dict):
        """Answer a request with two models: who answers shows at the end."""
        criteria = StoppingCriteriaList([Rows([job], lambda job: None)])
        output = self.pair.generate(**inputs, **options, stopping_criteria=criteria)
        for token in output.sequences[0, job.prompt_tokens + len(job.tokens) :].tolist():
            if not job.done:  # an answer of the guide comes as a whole
                job.put(token)
        job.qgsa = self.describe(job, output.get("selection"), 0)
        if job.qgsa is not None:
            job.qgsa |= self.describe_guide(job.qgsa, output)
        self.end(job)

    def finish(self, job: Job):
        """Resolve a job if it is complete."""
        if job.finish_reason is not None and not job.future.done():
            self.metrics.note(job, time.perf_counter())
            job.finish()

    def end(self, job: Job):
        """Resolve a job after its last token; a checkpoint may set other ends, such as `max_time`."""
        if not job.done:
            job.finish_reason = "length"
        self.finish(job)

    def describe(self, job: Job, selection, row: int) -> dict | None:
        """Cost of each image of a request, `row` of the batch; everything counts without a `selection`.

        Returns visual_tokens (kept) and tiles (encoded at high resolution), each also for "dense", one number per
        image; and vision_share, the share of the text model's work on visual tokens that its layers do. None without
        images.
        """
        if not job.images:
            return None
        config = self.model.config
        layout = VisualLayout.of(config, job.inputs["input_ids"])
        tiles = [rows * columns for rows, columns in layout.grids.tolist()]
        tokens = [(count + 1) * config.tokens_per_tile for count in tiles]
        described = {"visual_tokens": tokens, "visual_tokens_dense": tokens, "tiles": tiles, "tiles_dense": tiles}
        described["vision_share"] = 1.0
        if selection is not None:
            kept = selection.kept_tokens[row, : sum(tokens)].split(tokens)
            encoded = selection.kept_tiles[row, : sum(tiles) + len(tiles)].split([count + 1 for count in tiles])
            described["visual_tokens"] = [int(image.sum()) for image in kept]
            described["tiles"] = [int(image[:-1].sum()) for image in encoded]  # the last is the global view
            described["vision_share"] = round(float(selection.vision_share[row]), 4)
        return described

    @staticmethod
    def describe_guide(qgsa: dict, output: GuidedOutput) -> dict:
        """Which of two models answered, and how sure the guide was; the target saw nothing if the guide answered."""
        assert output.answered_by_guide is not None and output.confidence is not None
        alone, confidence = bool(output.answered_by_guide[0]), float(output.confidence[0])
        described = {"answered_by": "guide" if alone else "target", "confidence": confidence}
        return described | ({name: [0] * len(qgsa[name]) for name in ("visual_tokens", "tiles")} if alone else {})

    def close(self):
        """End the workers and the threads."""
        self.batches.close()
        self.images.close()
        self.template.close()
        self.parser.shutdown(wait=False)
