"""The tiny stand-in for SmolVLM: architecture, tokenizer and processor, built from scratch.

A tile has 64 px, a patch 8 px, a visual token 2 x 2 patches: 16 tokens per tile, 17 tiles and 272 tokens per image.
"""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

from modeling_qgsa import QGSAProcessor
from training.data.cards import FAMILIES, make_question, make_scene


TILE_TOKENS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
SPECIAL_TOKENS = ["<global-img>", *TILE_TOKENS, "<fake_token_around_image>", "<image>", "<end_of_utterance>"]
VOCABULARY = 512
SIZES = {  # 1.8 and 7.0 M parameters
    "tiny": {
        "vision": {
            "hidden_size": 96,
            "intermediate_size": 288,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "initializer_range": 0.1,
        },
        "text": {
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "initializer_range": 0.09,
        },
    },
    "small": {
        "vision": {
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "initializer_range": 0.09,
        },
        "text": {
            "hidden_size": 192,
            "intermediate_size": 576,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "initializer_range": 0.07,
        },
    },
}

# SmolVLM's conversation format: no space after the role if the turn starts with an image.
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'][0]['type'] != 'image' %}{{ ' ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def _corpus(questions: int = 4000):
    """Questions and answers of the training split, without pictures."""
    rng = np.random.default_rng(0)
    families = list(FAMILIES)
    for number in range(questions):
        cards = make_scene(rng, "train")
        turn = make_question(rng, families[number % len(families)], cards, cards[0])
        if turn is not None:
            yield f"User: {turn['question']}\nAssistant: {turn['answer']}"


def build_tokenizer(texts=None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens trained on `texts` (by default cards), with SmolVLM's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus() if texts is None else texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    return fast


def build_processor(texts=None, longest_edge: int = 256) -> Idefics3Processor:
    """The stock processor with tiles of 64 px: images are scaled to `longest_edge` px on the longer side and split."""
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": longest_edge}, max_image_size={"longest_edge": 64}
    )
    return Idefics3Processor(image_processor, build_tokenizer(texts), image_seq_len=16, chat_template=CHAT_TEMPLATE)


def save_processor(processor: Idefics3Processor, folder):
    """Save a processor in the format of the published checkpoints, which transformers 4 reads too."""
    folder = Path(folder)
    processor.image_processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for name in ("backend", "is_local", "local_files_only"):
        config.pop(name, None)
    special = config.pop("extra_special_tokens")
    config |= {
        "additional_special_tokens": special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    path.write_text(json.dumps(config, indent=2) + "\n")
    own = {"image_seq_len": processor.image_seq_len, "processor_class": "Idefics3Processor"}
    (folder / "processor_config.json").write_text(json.dumps(own, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(processor.chat_template)


def build_model(processor: Idefics3Processor, size: str = "tiny") -> Idefics3ForConditionalGeneration:
    """A new Idefics3 of one of the `SIZES`, initialised from torch's global generator.

    The standard deviation of the weights is 1 / sqrt(width): with the usual 0.02, a model of width 128 does not learn
    binding in reasonable time. Attention has a mimetic initialisation, see `attend_to_alike`.

    Raises ValueError for an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size ({size!r}): choose from {', '.join(SIZES)}")
    tokenizer = processor.tokenizer
    end_id = tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    config = Idefics3Config(
        image_token_id=processor.image_token_id,
        scale_factor=2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        vision_config=SIZES[size]["vision"] | {"image_size": 64, "patch_size": 8},
        text_config=SIZES[size]["text"]
        | {
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": end_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )
    model = Idefics3ForConditionalGeneration(config)
    for layer in model.model.text_model.layers:
        attend_to_alike(layer.self_attn)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def build_stand_in(
    texts=None, longest_edge: int = 256, size: str = "tiny"
) -> tuple[Idefics3ForConditionalGeneration, QGSAProcessor]:
    """A new stand-in and a QGSA processor for it; arguments as in `build_processor` and `build_model`."""
    stock = build_processor(texts, longest_edge)
    parts = {"image_seq_len": stock.image_seq_len, "chat_template": stock.chat_template}
    return build_model(stock, size), QGSAProcessor(stock.image_processor, stock.tokenizer, **parts)


@torch.no_grad()
def attend_to_alike(attention, gain: float = 1.2):
    """Initialise self-attention so that tokens attend to similar tokens and copy their contents.

    Keys start equal to queries, the output projection as the transpose of the values (Trockman and Kolter, "Mimetic
    Initialization of Self-Attention Layers", 2023). Answering starts with finding the object that was named.
    """
    attention.q_proj.weight.mul_(gain)
    attention.k_proj.weight.copy_(attention.q_proj.weight)
    attention.o_proj.weight.copy_(attention.v_proj.weight.T)
