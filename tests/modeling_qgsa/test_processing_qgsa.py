import numpy as np
import pytest
import torch
from chats import turn
from PIL import Image

from modeling_qgsa import QGSAProcessor
from modeling_qgsa.images_qgsa import check_size
from modeling_qgsa.processing_qgsa import ENCODED, KEPT, kept_maps, scale_to
from training.data.collator import QuestionCollator


def text_of(processor, inputs, row=0):
    return processor.tokenizer.decode(inputs["input_ids"][row][inputs["question_mask"][row].bool()])


@pytest.fixture
def ask(processor, make_image):
    """Processes a conversation about one small image."""

    def make(*messages, **kwargs):
        text = processor.apply_chat_template(list(messages), add_generation_prompt=True)
        return processor(text=text, images=[make_image(0, 256, 64)], return_tensors="pt", **kwargs)

    return make


def test_inputs_are_those_of_the_stock_processor_and_the_question_mask(processor, stock_processor, make_image):
    text = [
        "User:<image>what is it?<end_of_utterance>\nAssistant:",
        "User: why is that so?<end_of_utterance>\nAssistant:",
    ]
    call = {"text": text, "images": [[make_image()], []], "padding": True, "return_tensors": "pt"}
    inputs, expected = dict(processor(**call)), stock_processor(**call)
    mask = inputs.pop("question_mask")
    assert set(inputs) == set(expected) and all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert mask.shape == inputs["input_ids"].shape and mask.dtype == torch.int64


def test_question_mask_marks_the_question(processor, batch, samples):
    for row, (question, _) in enumerate(samples):
        assert text_of(processor, batch, row) == f"<|im_start|>User:{question}"
    assert (batch["question_mask"] <= batch["attention_mask"]).all()


def test_question_mask_marks_the_last_turn_of_the_user_only(processor, ask):
    inputs = ask(turn("user", "what is red?", 1), turn("assistant", "the star"), turn("user", "where is it?"))
    assert text_of(processor, inputs).strip() == "User: where is it?"


def test_question_mask_does_not_mark_an_answer(processor, make_image):
    """In training the answer follows the question and is closed the same way."""
    sample = {"image": make_image(0, 256, 64), "question": "what shape is it?", "answer": "star"}
    turns = [sample, {"question": "where is it?", "answer": "row 1 column 2"}]
    inputs = QuestionCollator(processor)([sample, {"image": sample["image"], "turns": turns}])
    assert text_of(processor, inputs, 0) == "<|im_start|>User:what shape is it?"
    assert text_of(processor, inputs, 1).strip() == "User: where is it?"


def test_question_mask_gives_what_the_model_finds_by_itself(model, processor, stock_processor, make_image, ask):
    single = ask(turn("user", "what is red?", 1))
    sample = {"image": make_image(0, 256, 64), "question": "what shape is it?", "answer": "star"}
    for inputs in (dict(single), QuestionCollator(processor)([sample])):
        with torch.no_grad():
            given = model(**inputs).selection.relevance
            found = model(**{name: inputs[name] for name in inputs if name != "question_mask"}).selection.relevance
        assert torch.equal(given, found)


def test_lists_come_back_as_lists(processor, make_image):
    inputs = processor(text="<image>what?", images=make_image(0, 256, 64))
    assert isinstance(inputs["question_mask"][0], list)
    assert len(inputs["question_mask"][0]) == len(inputs["input_ids"][0])
    assert sum(inputs["question_mask"][0]) > 0


def test_text_alone_and_images_alone(processor, make_image):
    text = processor(text="how many?", return_tensors="pt")
    assert set(text) == {"input_ids", "attention_mask"}
    assert "question_mask" not in processor(images=make_image(), return_tensors="pt")


def test_saved_and_loaded(processor, make_image, tmp_path):
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "processing_qgsa.py").exists() and (tmp_path / "selection_qgsa.py").exists()
    loaded = QGSAProcessor.from_pretrained(tmp_path, backend="pil")
    call = {"text": "<image>what is it?", "images": make_image(), "return_tensors": "pt"}
    inputs, expected = loaded(**call), processor(**call)
    assert set(inputs) == set(expected) and all(torch.equal(inputs[name], expected[name]) for name in expected)
    message = [turn("user", "why?", 1)]
    assert loaded.apply_chat_template(message) == processor.apply_chat_template(message)


# Bad input


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (3, 3), (2001, 10)])
def test_images_too_small_or_too_long(processor, size):
    width, height = size
    image = Image.new("RGB", size)
    array = np.asarray(image)
    with pytest.raises(ValueError, match=rf"image \({width} x {height} px\)"):
        processor(text="<image>what is it?", images=image, return_tensors="pt")
    for other in (array, torch.as_tensor(array.copy()).permute(2, 0, 1)):
        with pytest.raises(ValueError, match=r"px\): each side must have at least 4 px"):
            processor(text="<image>what is it?", images=other, return_tensors="pt")


def test_images_given_by_path_are_loaded_and_checked(processor, make_image, tmp_path):
    for image, name in ((make_image(), "image.png"), (Image.new("RGB", (1, 50)), "thin.png")):
        image.save(tmp_path / name)
    expected = processor(text="<image>what is it?", images=make_image(), return_tensors="pt")
    for images in (str(tmp_path / "image.png"), [str(tmp_path / "image.png")], [[str(tmp_path / "image.png")]]):
        inputs = processor(text="<image>what is it?", images=images, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    with pytest.raises(ValueError, match=r"image \(1 x 50 px\)"):
        processor(text="<image>what is it?", images=[[str(tmp_path / "thin.png")]], return_tensors="pt")


@pytest.mark.parametrize("size", [(4, 4), (800, 4), (2000, 10)])
def test_images_at_the_limit_are_answered(model, processor, size):
    image = Image.new("RGB", size, (200, 30, 90))
    check_size(*size)
    inputs = processor(text="<image>what is it?", images=image, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=1).shape[1] == inputs["input_ids"].shape[1] + 1


@pytest.mark.parametrize("question", ["", "  ", "\n"])
def test_an_empty_question_is_not_marked(ask, question):
    assert not ask(turn("user", question, 1))["question_mask"].any()


def test_an_empty_question_in_a_batch(prepare, samples):
    batch = prepare(samples[0], ("", samples[1][1]))
    assert batch["question_mask"].any(1).tolist() == [True, False]


@pytest.mark.parametrize("name", ["videos", "audio", "audios"])
@pytest.mark.parametrize("lazy_tiles", [None, True])
def test_videos_and_audio_are_refused(name, lazy_tiles, processor, make_image):
    call = {"text": "<image>what is it?", "images": make_image(0, 64, 64), "return_tensors": "pt"}
    for given in (["clip.mp4"], [[make_image()]], np.zeros((2, 64, 64, 3))):
        with pytest.raises(
            ValueError, match=rf"{name} \(.*\): only images and text .* Give the frames of a video as im"
        ):
            processor(**call, **{name: given}, lazy_tiles=lazy_tiles)
    expected = processor(**call, lazy_tiles=lazy_tiles)["input_ids"]
    for nothing in (None, [], [[]]):
        assert torch.equal(processor(**call, **{name: nothing}, lazy_tiles=lazy_tiles)["input_ids"], expected)


@pytest.mark.parametrize("kind", ["video", "audio", "image_url"])
@pytest.mark.parametrize("options", [{}, {"tokenize": True, "return_dict": True}])
def test_parts_that_the_template_drops_are_refused(kind, options, processor):
    chat = [{"role": "user", "content": [{"type": kind, kind: "clip.mp4"}, {"type": "text", "text": "what is it?"}]}]
    for conversation in (chat, [chat, chat]):
        with pytest.raises(ValueError, match=rf"type \('{kind}'\) of a part of a message must be 'text' or 'image'"):
            processor.apply_chat_template(conversation, **options)


def test_messages_of_plain_text_are_as_stock(processor, stock_processor):
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    chat = [{"role": "user", "content": "what is it?"}]
    for conversation in (chat, [chat, chat]):
        expected = stock_processor.apply_chat_template(conversation, chat_template=template)
        assert processor.apply_chat_template(conversation, chat_template=template) == expected


def test_the_names_of_the_inputs_are_known(processor, make_image):
    inputs = processor(images=make_image(), text="<image>what is it?", return_tensors="pt")
    assert set(processor.model_input_names) == set(inputs)


def test_images_and_placeholders_that_do_not_match(processor, make_image):
    with pytest.raises(ValueError, match=r"2\]?.* but.* \[?1\]?"):
        processor(text="<image><image>what?", images=[[make_image()]])


# Pictures


def test_drawing_has_the_size_of_the_image(processor, model, single, make_image):
    selection = model.select(**single)
    for image in (make_image(), make_image().resize((123, 77)), make_image().convert("L"), np.asarray(make_image())):
        drawn = processor.draw_selection(image, selection)
        size = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
        assert drawn.mode == "RGB" and drawn.size == size


def test_drawing_takes_a_path(processor, model, single, make_image, tmp_path):
    make_image().save(tmp_path / "image.png")
    selection = model.select(**single)
    drawn = processor.draw_selection(str(tmp_path / "image.png"), selection)
    assert np.array_equal(drawn, processor.draw_selection(make_image(), selection))


def test_drawing_takes_an_opened_image(processor, model, single, make_image):
    """Drawn as it was scaled."""
    selection, opened = model.select(**single), processor.open(make_image(0))
    drawing = processor.draw_selection(opened, selection)
    assert np.array_equal(drawing, processor.draw_selection(opened.to_pil(), selection))


def test_drawings_show_the_selection(processor, model, single, make_image):
    budget = {"min_tiles": 1, "max_tiles": 1, "min_visual_tokens": 2, "max_visual_tokens": 2}
    image, drawn = make_image(), []
    for tile in (5, 10):
        scores = torch.zeros(1, 272)
        scores[0, tile * 16 + torch.tensor([5, 6])] = 1
        drawn.append(
            np.asarray(processor.draw_selection(image, model.select(**single, **budget, visual_token_scores=scores)))
        )
    assert not np.array_equal(*drawn)
    # Tokens 5 and 6 of tile 5 are the cells in row 5 and columns 5 and 6 of 16 x 16, 16 px wide each.
    coloured = (drawn[0] == np.asarray(image)).all(-1)
    assert coloured[82:94, 82:94].all() and coloured[82:94, 98:110].all()
    assert coloured[:60, :60].mean() < 0.02 and coloured[150:, 150:].mean() < 0.02
    assert tuple(drawn[0][80, 88]) == KEPT and tuple(drawn[0][64, 100]) == ENCODED


def test_kept_maps_of_several_images(model, prepare, make_image):
    rows = [("which?", [make_image(1, 256, 64), make_image(2, 64, 128)]), ("where?", [make_image(3)])]
    inputs = prepare(*rows)
    scores = torch.zeros(2, 272)
    wanted = [(0, 2, 6), (0, 5 + 7, 9), (1, 14, 0)]
    for row, tile, token in wanted:
        scores[row, tile * 16 + token] = 1
    budget = {"min_tiles": 1, "max_tiles": 1, "min_visual_tokens": 1, "max_visual_tokens": 1}
    selection = model.select(**inputs, **budget, visual_token_scores=scores)
    for index, (shape, cell, tile) in enumerate(
        [((4, 16), (1, 10), (0, 2)), ((16, 8), (14, 5), (3, 1)), ((16, 16), (12, 8), (3, 2))]
    ):
        tiles, glance, encoded = kept_maps(selection, index, 16)
        assert tiles.shape == glance.shape == shape
        assert np.argwhere(tiles).tolist() == [list(cell)] and not glance.any()
        assert np.argwhere(encoded).tolist() == [list(tile)]


def test_a_single_tile_is_its_own_global_view(processor, model, prepare, make_image):
    inputs = prepare(("what?", [make_image(1)]), do_image_splitting=False)
    scores = torch.zeros(1, 16)
    scores[0, 6] = 1
    selection = model.select(**inputs, visual_token_scores=scores, min_visual_tokens=1, max_visual_tokens=1)
    tiles, glance, _ = kept_maps(selection, 0, 16)
    assert not tiles.any() and np.argwhere(glance).tolist() == [[1, 2]]
    coloured = (np.asarray(processor.draw_selection(make_image(1), selection)) == np.asarray(make_image(1))).all(-1)
    assert coloured[64:128, 128:192].all() and coloured[130:, :].mean() < 0.02


@pytest.mark.parametrize("index", [-1, 1, 7])
def test_drawing_an_image_that_is_not_there(processor, model, single, make_image, index):
    with pytest.raises(
        ValueError, match=rf"index \({index}\) must be below the number of images in the selection \(1\)"
    ):
        processor.draw_selection(make_image(), model.select(**single), index)


@pytest.mark.parametrize("width, height", [(4, 4), (15, 8), (256, 4)])
def test_images_with_less_pixels_than_cells_are_drawn(width, height, processor, model, prepare, make_image):
    image = make_image(0).resize((width, height))
    selection = model.select(**prepare(("what is it?", [image])), min_tiles=16, max_tiles=16)
    assert processor.draw_selection(image, selection).size == (width, height)


def test_scale_to_repeats_cells():
    cells = np.array([[True, False]])
    assert scale_to(cells, (4, 2)).tolist() == [[True, True, False, False]] * 2


@pytest.mark.parametrize("options", [{"do_rescale": False}, {"images_kwargs": {"do_rescale": False}}])
@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor])
def test_floats_that_are_not_to_be_rescaled_are_the_stock_processors(options, make, processor, make_image):
    image = make(np.asarray(make_image(), dtype=np.float32) / 255)
    given = {"images": [[image]], "text": "<image>what is it?", "return_tensors": "pt", **options}
    stock = super(QGSAProcessor, processor).__call__(**given)
    assert torch.equal(processor(**given)["pixel_values"], stock["pixel_values"])
    assert stock["pixel_values"].abs().max() <= 1


def test_arrays_with_an_alpha_channel_are_as_the_picture(processor, make_image):
    image = make_image().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    text = {"text": "<image>what is it?", "return_tensors": "pt"}
    expected = processor(images=image, **text)["pixel_values"]
    for array in (np.asarray(image), np.asarray(image).transpose(2, 0, 1)):
        assert torch.equal(processor(images=array, **text)["pixel_values"], expected)
