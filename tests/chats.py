"""Chat templates of several models, on the tokenizer of the tiny stand-in."""

import copy

from modeling_qgsa import QGSAProcessor


SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GRANITE = (
    "{% for message in messages %}{{ '<|start_of_role|>' + message['role'] + '<|end_of_role|>' }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
IDEFICS3 = (
    "<|im_start|>{% for message in messages %}{{ message['role'].capitalize() + ':' }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] | trim }}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
CHATML_OF_STRINGS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The template, the token that closes a turn, what opens an answer, and what opens a question.
TEMPLATES = {
    "smolvlm": (SMOLVLM, "<end_of_utterance>", "\nAssistant:", "User:"),
    "chatml": (CHATML, "<|im_end|>", "\n<|im_start|>assistant", "user"),
    "granite": (GRANITE, "<|end_of_text|>", "\n<|start_of_role|>assistant<|end_of_role|>", "user"),
    "idefics3": (IDEFICS3, "<end_of_utterance>", "\nAssistant:", "User:"),
}


def with_template(processor: QGSAProcessor, template: str | None) -> QGSAProcessor:
    """A processor with another chat template, and with the special tokens of all templates."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    roles = ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"]
    tokenizer.add_tokens(roles, special_tokens=True)
    return QGSAProcessor(processor.image_processor, tokenizer, image_seq_len=16, chat_template=template)


def turn(role: str, text: str, images: int = 0) -> dict:
    """A message of a chat."""
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}
