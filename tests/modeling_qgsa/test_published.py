"""Every published family of checkpoints, as a random twin with its sizes and the ids of its special tokens.

Ids and sizes: 256M, 500M, 2.2B and docling models of SmolVLM, granite-docling, and Idefics3-8B-Llama3.
"""

from dataclasses import dataclass

import pytest
import torch
from chats import GRANITE, IDEFICS3, SMOLVLM, turn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from modeling_qgsa import QGSAProcessor, QGSASmolVLMForConditionalGeneration
from modeling_qgsa.request_qgsa import Request


QUESTION, ANSWER = "what is left of the lung?", "a rib"
PLACES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
SMOLVLM_IDS = {"<fake_token_around_image>": 49189, "<image>": 49190, "<end_of_utterance>": 49279}
SMOLVLM_IDS |= {"<global-img>": 49152} | {place: 49153 + number for number, place in enumerate(PLACES)}
GRANITE_IDS = {"<|start_of_role|>": 100264, "<|end_of_role|>": 100265, "<fake_token_around_image>": 100269}
GRANITE_IDS |= {"<image>": 100270, "<|end_of_text|>": 100257, "<global-img>": 100280, "<end_of_utterance>": 100279}
GRANITE_IDS |= {place: 100281 + number for number, place in enumerate(PLACES)}


@dataclass(frozen=True)
class Family:
    """Sizes of a family, and the ids of its special tokens; markers of tiles without an id are ordinary text."""

    kind: str
    tile: int
    patch: int
    scale: int
    tokens: int
    edge: int
    template: str
    ids: dict
    bos: str = "<|im_start|>"


FAMILIES = {
    "SmolVLM-256M": Family("idefics3", 512, 16, 4, 64, 2048, SMOLVLM, SMOLVLM_IDS | {"<|im_start|>": 1}),
    "SmolVLM2-500M": Family("smolvlm", 512, 16, 4, 64, 2048, SMOLVLM, SMOLVLM_IDS | {"<|im_start|>": 1}),
    "SmolVLM-2.2B": Family(
        "idefics3",
        384,
        14,
        3,
        81,
        1536,
        SMOLVLM,
        {"<fake_token_around_image>": 49152, "<image>": 49153, "<end_of_utterance>": 49154, "<|im_start|>": 1},
    ),
    "SmolVLM2-2.2B": Family("smolvlm", 384, 14, 3, 81, 1536, SMOLVLM, SMOLVLM_IDS | {"<|im_start|>": 1}),
    "granite-docling-258M": Family("idefics3", 512, 16, 4, 64, 2048, GRANITE, GRANITE_IDS, "<|end_of_text|>"),
    "Idefics3-8B-Llama3": Family(
        "idefics3",
        364,
        14,
        2,
        169,
        1456,
        IDEFICS3.replace("<|im_start|>", "<|begin_of_text|>"),
        {
            "<|begin_of_text|>": 128000,
            "<fake_token_around_image>": 128256,
            "<image>": 128257,
            "<end_of_utterance>": 128258,
        },
        "<|begin_of_text|>",
    ),
}


def make_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes with the family's special tokens at their ids."""
    taken = {number: token for token, number in family.ids.items()}
    free = (number for number in range(max(taken) + 1) if number not in taken)
    vocabulary = dict(family.ids)
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = next(free)
    vocabulary |= {f"unused {number}": number for number in free}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(family.ids))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=family.bos, pad_token=family.bos)


@pytest.fixture(scope="module", params=FAMILIES)
def twin(request):
    """A family, its processor, and its dense model with random weights."""
    family = FAMILIES[request.param]
    tile = {"longest_edge": family.tile}
    images = Idefics3ImageProcessorPil(size={"longest_edge": family.edge}, max_image_size=tile)
    tokenizer = make_tokenizer(family)
    processor = QGSAProcessor(images, tokenizer, image_seq_len=family.tokens, chat_template=family.template)
    config_class, model_class = {
        "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
        "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
    }[family.kind]
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    config = config_class(
        image_token_id=family.ids["<image>"],
        scale_factor=family.scale,
        pad_token_id=tokenizer.pad_token_id,
        vision_config=layers | {"image_size": family.tile, "patch_size": family.patch},
        text_config=layers
        | {"model_type": "llama", "vocab_size": len(tokenizer), "num_key_value_heads": 2, "initializer_range": 0.2},
    )
    torch.manual_seed(0)
    return family, processor, model_class(config).eval()


@pytest.fixture(scope="module")
def asked(twin, make_image):
    """A conversation about an image of 1 x 2 tiles whose last turn is open."""
    family, processor, _ = twin
    messages = [turn("user", "is this a chest?", 1), turn("assistant", ANSWER), turn("user", QUESTION)]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    size = {"longest_edge": 2 * family.tile}
    return dict(processor(text=text, images=make_image(0, 256, 128), size=size, return_tensors="pt"))


def test_sizes_and_markers_are_read_from_the_checkpoint(twin):
    family, processor, dense = twin
    config = QGSASmolVLMForConditionalGeneration.from_dense(dense, processor.tokenizer).config
    assert config.tokens_per_tile == family.tokens
    assert config.image_token_id == family.ids["<image>"]
    if "<global-img>" in family.ids:
        assert config.global_image_token_id == family.ids["<global-img>"]
        assert config.tile_token_ids == [family.ids[place] for place in PLACES]
    else:
        assert processor.tokenizer.decode(config.global_image_token_id) == "<global-img>"
        assert [processor.tokenizer.decode(each) for each in config.tile_token_ids] == PLACES


def test_a_large_image_has_the_tiles_of_its_edge(twin, make_image):
    family, processor, _ = twin
    inputs = processor(text="<image>why?", images=make_image(0, 1024, 768), return_tensors="pt")
    assert inputs["pixel_values"].shape[1] == 4 * 3 + 1
    assert (inputs["input_ids"] == family.ids["<image>"]).sum() == 13 * family.tokens


def test_the_question_is_the_last_turn(twin, asked):
    _, processor, dense = twin
    marked = processor.decode(asked["input_ids"][0][asked["question_mask"][0].bool()], skip_special_tokens=True)
    assert marked.strip().removeprefix("User:").removeprefix("user").strip() == QUESTION
    model = QGSASmolVLMForConditionalGeneration.from_dense(dense, processor).eval()
    for given in (asked, {name: value for name, value in asked.items() if name != "question_mask"}):
        read = Request.take(model.config, dict(given)).question_mask[0]
        words = processor.decode(asked["input_ids"][0][read], skip_special_tokens=True).strip()
        assert words.removeprefix("User:").removeprefix("user").strip() == QUESTION


@pytest.mark.parametrize("selection", ["before_encoder", "after_encoder", "blocks"])
def test_everything_kept_is_dense(selection, twin, asked):
    _, processor, dense = twin
    dense.set_attn_implementation("eager" if selection == "blocks" else "sdpa")
    model = QGSASmolVLMForConditionalGeneration.from_dense(dense, processor, selection=selection).eval()
    most = dict.fromkeys(("min_visual_tokens", "max_visual_tokens", "min_tiles", "max_tiles"), 2**20)
    stock = {name: value for name, value in asked.items() if name != "question_mask"}
    with torch.no_grad():
        outputs = model(**asked, **most)
        torch.testing.assert_close(outputs.logits, dense(**stock).logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(model(**asked, selection="dense").logits, dense(**stock).logits)


@pytest.mark.parametrize("selection", ["before_encoder", "after_encoder", "blocks"])
def test_its_attention_chooses_whole_tiles(selection, twin, asked, tiles_encoded):
    family, processor, dense = twin
    dense.set_attn_implementation("eager" if selection == "blocks" else "sdpa")
    model = QGSASmolVLMForConditionalGeneration.from_dense(dense, processor, selection=selection, max_tiles=1).eval()
    with tiles_encoded(model) as counts:
        generated = model.generate(**asked, max_new_tokens=2, min_tiles=1, do_sample=False)
    assert generated.shape[1] == asked["input_ids"].shape[1] + 2
    assert sum(counts) == (3 if selection == "after_encoder" else 2)
    chosen = model.select(**asked, min_tiles=1)
    assert chosen.visual_tokens.tolist() == [2 * family.tokens]
    if selection == "before_encoder":
        kept = asked["input_ids"][0][chosen.keep_indices[0]].tolist()
        assert processor.decode(kept).count("<row_1_col_") == 2, "the markers of the other tile stay"
