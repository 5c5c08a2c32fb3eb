"""The chat template of a checkpoint: a program that anyone may have written, run by workers that can be killed."""

from pathlib import Path

from serve_errors import RequestError
from serve_workers import WorkerKilled, Workers

from modeling_qgsa import QGSAProcessor


RENDERER = Path(__file__).with_name("serve_renderer.py")
SECONDS = 10  # per conversation; a thousand messages take some milliseconds
MEMORY = 2**30  # bytes; transformers without torch takes a tenth
EXAMPLE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]


class ChatTemplate:
    """Applies the chat template of a processor.

    Args:
        processor: the processor.
        count: conversations at the same time.
        max_characters: of the prompt; what is longer does not fit into the model's context.

    Raises ValueError if the template fails on one question about one image.
    """

    def __init__(self, processor: QGSAProcessor, count: int, max_characters: int):
        template = processor.chat_template
        self.template = template["default"] if isinstance(template, dict) else template
        self.tokens, self.max_characters = dict(processor.tokenizer.special_tokens_map), max_characters
        self.workers = Workers(RENDERER, count, MEMORY)
        try:
            self.apply(EXAMPLE)
        except RequestError as error:
            self.close()
            raise ValueError(error.message.removeprefix("messages: ")) from error

    def apply(self, turns: list[dict]) -> str:
        """The prompt that asks for the next turn. Raises RequestError if the template does not make one."""
        job = {"conversations": [turns], "chat_template": self.template, "add_generation_prompt": True, **self.tokens}
        try:
            result, prompt = self.workers.run(SECONDS, job)
        except WorkerKilled as error:
            message = f"messages: the chat template takes more than {SECONDS} s or {MEMORY >> 20} MB"
            raise RequestError(message, "messages") from error
        if "error" in result:
            raise RequestError(f"messages: the chat template fails ({result['error']})", "messages")
        text = prompt.decode()
        if len(text) > self.max_characters:
            raise RequestError(
                f"messages: the prompt's {len(text)} characters exceed the {self.max_characters} that fit into the "
                "model's context",
                "messages",
                code="context_length_exceeded",
            )
        return text

    def close(self):
        """End the workers."""
        self.workers.close()
