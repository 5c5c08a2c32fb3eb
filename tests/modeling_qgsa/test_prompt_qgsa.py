"""The question about each image, at every door: found in the prompt, or given as a mask."""

import copy
import logging

import pytest
import torch
from chats import TEMPLATES, turn, with_template

from modeling_qgsa import QGSAConfig, QGSAProcessor
from modeling_qgsa.conversion_qgsa import marker_ids
from modeling_qgsa.layout_qgsa import VisualLayout
from modeling_qgsa.prompt_qgsa import Prompt, read_question


QUESTIONS = ["what shape is on the red card?", "where is it?", "how many cards are there, and what is on them?"]
ANSWERS = ["moon", "in row 2, column 3", "two"]
SIZES = [(256, 64), (64, 128), (64, 64)]


def without_mask(inputs):
    return {name: value for name, value in inputs.items() if name != "question_mask"}


def read(config, inputs, **fields):
    """The question of each sample with one image, `(B, L)` bool."""
    inputs = {**inputs, **fields}
    prompt = Prompt.of(inputs["input_ids"], inputs["attention_mask"], None, inputs.get("labels"))
    layout = VisualLayout.of(config, prompt.input_ids)
    return read_question(config, prompt, layout, inputs.get("question_mask"))[0]


def marked(inputs, mask):
    """The marked ids of each sample."""
    return [ids[: len(row)][row.bool()].tolist() for ids, row in zip(inputs["input_ids"], mask)]


@pytest.fixture(scope="module")
def images(make_image):
    return [[make_image(number, *size)] for number, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def chats():
    """Chats with one, two and three turns."""
    return [
        [turn("user", QUESTIONS[0], 1)],
        [turn("user", "what is blue?", 1), turn("assistant", "star"), turn("user", QUESTIONS[1])],
        [turn("system", "be brief"), turn("user", QUESTIONS[2], 1)],
    ]


@pytest.fixture(scope="module")
def collate(images):
    """Prompts and answers as TRL's collators join them: answers are padded on the right of left-padded prompts."""

    def make(processor, chats, answers=ANSWERS):
        prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        whole = [
            processor.apply_chat_template([*chat, turn("assistant", answer)]) for chat, answer in zip(chats, answers)
        ]
        completions = [text.removeprefix(prompt) for text, prompt in zip(whole, prompts)]
        options = {"padding": True, "return_tensors": "pt", "add_special_tokens": False}
        inputs = dict(processor(text=prompts, images=images[: len(chats)], padding_side="left", **options))
        added = processor(text=completions, padding_side="right", **options)
        for name in ("input_ids", "attention_mask"):
            inputs[name] = torch.cat([inputs[name], added[name]], 1)
        inputs["answers"] = torch.cat([torch.zeros_like(inputs["question_mask"]), added["attention_mask"]], 1)
        return inputs

    return make


def flush(inputs, side):
    """Move every sample to one side of the batch, as TRL's `flush_left` does, all but the question mask."""
    mask = inputs["attention_mask"].bool()
    order = (mask if side == "right" else ~mask).int().sort(dim=1, stable=True).indices
    width = int(mask.sum(1).max())
    kept = slice(None, width) if side == "left" else slice(-width, None)
    names = ("input_ids", "attention_mask", "answers")
    return {**inputs, **{name: inputs[name].gather(1, order)[:, kept] for name in names}}


# Without a mask


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_the_model_finds_what_the_processor_marks(name, side, processor, model, chats, collate):
    other = with_template(processor, TEMPLATES[name][0])
    config = QGSAConfig.from_dict({**model.config.to_dict(), **marker_ids(other)})
    inputs = collate(other, chats)
    expected = marked(inputs, inputs["question_mask"])
    assert [other.decode(ids).strip()[-len(each) :] for ids, each in zip(expected, QUESTIONS)] == QUESTIONS
    moved = flush(inputs, side) if side else inputs
    assert marked(moved, read(config, without_mask(moved))) == expected
    labels = moved["input_ids"].masked_fill(moved["answers"] == 0, -100)
    assert marked(moved, read(config, without_mask(moved), labels=labels)) == expected
    whole = moved["input_ids"].masked_fill(moved["attention_mask"] == 0, -100)
    assert marked(moved, read(config, without_mask(moved), labels=whole)) == expected


@pytest.mark.parametrize("ending", [" moon<end_of_utterance>\n", " moon<end_of_utterance>", " moon", ""])
@pytest.mark.parametrize("space", ["\n", ""])
def test_the_stock_processor_selects_as_ours_does_with_an_answer_in_the_prompt(
    ending, space, model, processor, stock_processor, images
):
    text = f"<|im_start|>User:<image>what is red?<end_of_utterance>{space}Assistant:"
    call = {"images": images[0], "return_tensors": "pt"}
    expected = model.select(**processor(text=text, **call)).relevance
    assert torch.equal(model.select(**stock_processor(text=text + ending, **call)).relevance, expected)
    assert torch.equal(model.select(**processor(text=text + ending, **call)).relevance, expected)


def test_an_old_checkpoint_is_warned_of_turns_whose_speakers_it_cannot_tell(
    model, processor, chats, collate, caplog, monkeypatch
):
    old = copy.deepcopy(model.config)
    old.assistant_token_ids = QGSAConfig().assistant_token_ids  # as loaded from a file without this field
    inputs = collate(processor, chats)
    logger = logging.getLogger("modeling_qgsa.prompt_qgsa")
    logger.addHandler(caplog.handler)
    try:
        one_turn = {name: value[:1] for name, value in without_mask(inputs).items()}
        read(old, {**one_turn, "attention_mask": one_turn["attention_mask"] * (one_turn["answers"] == 0)})
        read(model.config, without_mask(inputs))
        assert not caplog.records
        read(old, without_mask(inputs))
    finally:
        logger.removeHandler(caplog.handler)
    assert "No turn opens with assistant_token_ids" in caplog.text


# Labels


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("recipe", ["everything", "but padding", "but images", "but special tokens", "but roles"])
@pytest.mark.parametrize("given", ["question_mask", "no mask"])
def test_labels_over_the_whole_prompt_train(recipe, training, given, make_model, processor, chats, images):
    model = make_model().train(training)
    tokenizer = processor.tokenizer
    texts = [processor.apply_chat_template([*chat, turn("assistant", "moon")]).strip() for chat in chats]
    inputs = dict(processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt"))
    labels = inputs["input_ids"].clone()
    if recipe != "everything":
        labels[inputs["attention_mask"] == 0] = -100
    if recipe == "but images":
        labels[labels == processor.image_token_id] = -100
    if recipe == "but special tokens":
        labels[torch.isin(labels, torch.tensor(tokenizer.all_special_ids))] = -100
    if recipe == "but roles":
        labels[torch.isin(labels, torch.tensor(tokenizer("<|im_start|>User:Assistant:\n")["input_ids"]))] = -100
    asked = inputs if given == "question_mask" else without_mask(inputs)
    with torch.set_grad_enabled(training):
        expected = model(**inputs).selection.relevance
        outputs = model(**asked, labels=labels)
    assert torch.equal(outputs.selection.relevance, expected) and outputs.loss.isfinite()
    if training:
        outputs.loss.backward()
        assert model.model.selector.relevance.weight.grad.abs().max() > 0


def test_labels_over_everything_without_a_template_leave_no_question(model, processor, make_image):
    """Neither tells the answer from the question: nothing is selected by words that are to be learnt."""
    inputs = processor(text="<image>what is it? A moon", images=make_image(0, 64, 64), return_tensors="pt")
    selection = model(**without_mask(inputs), labels=inputs["input_ids"]).selection
    assert selection.kept_tokens.all() and selection.kept_tiles.all()


def test_a_mask_of_no_text_is_refused(model, batch):
    tiles = (batch["input_ids"] == model.config.image_token_id).long()
    count = int(tiles[0].sum())
    with pytest.raises(ValueError, match=f"sample 0: question_mask marks {count} positions, and 0 of them are text"):
        model(**batch | {"question_mask": tiles})


# Masks of another length


@pytest.fixture(scope="module")
def joined(processor, chats, collate):
    return collate(processor, chats)


@pytest.fixture(scope="module")
def expected(joined):
    return marked(joined, joined["question_mask"])


def test_a_mask_of_the_prompt_alone_is_continued(joined, expected, model):
    assert marked(joined, read(model.config, joined)) == expected
    inputs = {name: value for name, value in joined.items() if name != "answers"}
    found = model.select(**without_mask(inputs)).relevance
    assert torch.equal(model.select(**inputs).relevance, found)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_follows_samples_that_were_moved(side, joined, expected, model):
    moved = flush(joined, side)
    assert moved["question_mask"].shape != moved["input_ids"].shape
    assert marked(moved, read(model.config, moved)) == expected
    labels = moved["input_ids"].masked_fill(moved["answers"] == 0, -100)
    assert marked(moved, read(model.config, moved, labels=labels)) == expected


def test_a_mask_follows_samples_that_were_moved_and_cut_to_its_length(joined, expected, model):
    moved = flush(joined, "left")
    names = ("input_ids", "attention_mask")
    length = moved["input_ids"].shape[1] - 1
    cut = {name: moved[name][:, :length] for name in names}
    for width in (length, length + 1, length + 2):
        mask = torch.nn.functional.pad(joined["question_mask"], (0, width - joined["question_mask"].shape[1]))
        assert marked(cut, read(model.config, cut, question_mask=mask)) == expected


def halved(mask):
    """A mask of the user's own: every other token of the question."""
    places = mask.cumsum(1) % 2 == 1
    return mask * places


def test_a_mask_of_the_users_own_is_continued_if_padding_shows_its_place(joined, model):
    own = halved(joined["question_mask"])
    assert marked(joined, read(model.config, joined, question_mask=own)) == marked(joined, own)
    single = {name: value[2:] for name, value in joined.items()}
    start = int(single["attention_mask"].argmax(1))
    width = int(single["attention_mask"].sum())
    single = {name: single[name][:, start : start + width] for name in ("input_ids", "attention_mask")}
    own = own[2:, start:]
    assert marked(single, read(model.config, single, question_mask=own)) == marked(single, own)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_of_the_users_own_is_refused_where_its_place_is_unclear(side, joined, model):
    moved = flush(joined, side)
    own = halved(joined["question_mask"])
    message = (
        rf"question_mask has shape \(3, {own.shape[1]}\): expected 3 x {moved['input_ids'].shape[1]}, .* leave "
        "question_mask out"
    )
    with pytest.raises(ValueError, match=message):
        read(model.config, moved, question_mask=own)


def test_a_mask_of_the_users_own_stays_as_it_is(joined, model):
    """Whatever it marks, if it has the length of the prompt."""
    width = joined["input_ids"].shape[1]
    whole = torch.nn.functional.pad(joined["question_mask"], (0, width - joined["question_mask"].shape[1]))
    first = (joined["attention_mask"].cumsum(1) < 4).long() * joined["attention_mask"]
    for own in (halved(whole), first, torch.ones_like(whole)):
        question = read(model.config, joined, question_mask=own)
        assert question.any(1).all() and not (question & (own == 0)).any()
    text = VisualLayout.of(model.config, joined["input_ids"]).tile_of_position < 0
    everything = read(model.config, joined, question_mask=torch.ones_like(whole))
    assert torch.equal(everything, text & joined["attention_mask"].bool())


def test_a_mask_marks_an_earlier_turn(joined, model, tokenizer):
    """The user may ask about another turn than the last; it has as many tokens as the last one has."""
    width = joined["input_ids"].shape[1]
    own = torch.zeros_like(joined["input_ids"])
    ids = joined["input_ids"][1].tolist()
    start = ids.index(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    last = joined["question_mask"][1].sum()
    image = VisualLayout.of(model.config, joined["input_ids"]).tile_of_position[1] >= 0
    text = [place for place in range(start, width) if not image[place]][: int(last)]
    own[1, text] = 1
    own[[0, 2], : joined["question_mask"].shape[1]] = joined["question_mask"][[0, 2]]
    assert torch.equal(read(model.config, joined, question_mask=own)[1], own[1].bool())


# Shipped


def test_the_shipped_checkpoint_knows_its_assistant():
    folder = "hub_cards/tiny-qgsa"
    config, processor = QGSAConfig.from_pretrained(folder), QGSAProcessor.from_pretrained(folder, backend="pil")
    for name, value in marker_ids(processor).items():
        assert getattr(config, name) == value, name
