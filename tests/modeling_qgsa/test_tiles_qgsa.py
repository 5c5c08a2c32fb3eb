import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from packaging import version
from PIL import Image
from transformers import Idefics3ImageProcessor, Idefics3ImageProcessorPil

from modeling_qgsa import QGSAProcessor, tiles_qgsa
from modeling_qgsa.tiles_qgsa import LazyImage, LazyTiles


TINY = Path(__file__).parents[2] / "hub_cards" / "tiny-qgsa"

BACKENDS = [Idefics3ImageProcessorPil, Idefics3ImageProcessor]
SIZES = [(256, 256), (256, 64), (64, 128), (37, 91), (500, 333), (8, 300), (1000, 999), (64, 64), (63, 64), (5, 5)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("longest_edge, tile", [(256, 64), (2048, 512), (100, 64), (64, 64)])
def test_tiles_are_those_of_the_stock_processor(longest_edge, tile, split, backend):
    stock = backend(
        size={"longest_edge": longest_edge}, max_image_size={"longest_edge": tile}, do_image_splitting=split
    )
    rng = np.random.default_rng(0)
    for size in SIZES if tile == 64 else SIZES[3:5]:
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        expected = stock(image, return_tensors="pt", return_row_col_info=True)
        lazy = LazyImage(image, stock, longest_edge, split)
        tiles = LazyTiles([[lazy]], stock)
        assert lazy.grid == (expected["rows"][0][0], expected["cols"][0][0]) and tiles.counts == [lazy.last + 1]
        places = list(range(lazy.last + 1))
        assert torch.equal(tiles.cut([0] * len(places), places), expected["pixel_values"][0])
        assert torch.equal(tiles.global_views(), expected["pixel_values"][:, -1:])


def test_keys_tell_images_places_and_backends_apart(make_image):
    keys = []
    for backend in BACKENDS:
        stock = backend(max_image_size={"longest_edge": 64})
        first, same, other = (LazyImage(make_image(seed), stock, 256, True) for seed in (0, 0, 1))
        tiles = LazyTiles([[first], [same, other]], stock)
        keys += [tiles.key(0, 0), tiles.key(0, 1), tiles.key(1, 0), tiles.key(1, 17)]
    assert keys[0] == keys[2] and keys[4] == keys[6] and len(set(keys)) == 6


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_pixels_of_a_checkpoint_are_the_same_whether_tiles_are_cut_on_demand(backend, make_image):
    """A photograph is resized; both backends, as a user loads them."""
    processor = QGSAProcessor.from_pretrained(TINY, backend=backend)
    call = {"text": "<image>what?", "images": make_image(0).resize((333, 190)), "return_tensors": "pt"}
    eager, lazy = processor(**call), processor(**call, lazy_tiles=True)
    places = list(range(13))
    assert torch.equal(lazy["lazy_tiles"].cut([0] * 13, places), eager["pixel_values"][0])
    opened = processor(**call | {"images": processor.open(call["images"])})
    assert torch.equal(opened["lazy_tiles"].cut([0] * 13, places), eager["pixel_values"][0])


def test_lazy_inputs_are_those_of_the_stock_processor(processor, make_image):
    text = [
        "User:<image>what is it?<end_of_utterance>\nAssistant:",
        "User: why is that so?<end_of_utterance>\nAssistant:",
        "User:<image>and<image>now?<end_of_utterance>\nAssistant:",
    ]
    images = [[make_image(0)], [], [make_image(1, 256, 64), make_image(2, 32, 32)]]
    call = {"text": text, "padding": True, "return_tensors": "pt"}
    for given in (images, [image for sample in images for image in sample]):
        eager, lazy = processor(images=given, **call), processor(images=given, **call, lazy_tiles=True)
        for name in ("input_ids", "attention_mask", "question_mask"):
            assert torch.equal(eager[name], lazy[name])
        assert lazy["pixel_values"].shape == (3, 2, 3, 64, 64) and not lazy["pixel_values"][1].any()
        assert torch.equal(lazy["pixel_values"][2], eager["pixel_values"][2, [4, 5 + 4 * 4]])
        assert lazy["lazy_tiles"].counts == [17, 0, 5 + 17]


@pytest.mark.parametrize("kind", ["path", "RGBA", "LA", "P", "L", "array", "planes", "tensor", "list", "nested"])
def test_lazy_pixels_are_the_stock_processors_whatever_images_come_as(processor, make_image, tmp_path, kind):
    image = make_image(0)
    image.save(tmp_path / "image.png")
    faint = image.convert("RGBA")
    faint.putalpha(image.convert("L"))
    given = {
        "path": str(tmp_path / "image.png"),
        "RGBA": faint,
        "LA": faint.convert("LA"),
        "P": image.convert("P"),
        "L": image.convert("L"),
        "array": np.asarray(image),
        "planes": np.asarray(image).transpose(2, 0, 1),
        "tensor": torch.from_numpy(np.array(image)).permute(2, 0, 1),
        "list": [image],
        "nested": [[image]],
    }[kind]
    if kind in ("RGBA", "LA") and version.parse(transformers.__version__) < version.parse("5.20"):
        pytest.skip("the stock image processor of older versions drops alpha")
    call = {"text": "<image>what?", "images": given, "return_tensors": "pt"}
    eager, lazy = processor(**call), processor(**call, lazy_tiles=True)
    assert torch.equal(lazy["lazy_tiles"].cut([0] * 17, list(range(17))), eager["pixel_values"][0])


@pytest.mark.parametrize(
    "options, tiles",
    [
        ({"do_image_splitting": False}, 1),
        ({"size": {"longest_edge": 128}}, 5),
        ({"images_kwargs": {"size": {"longest_edge": 128}}}, 5),
        ({"text_kwargs": {"padding": "max_length", "max_length": 400, "return_tensors": "pt"}}, 17),
    ],
)
def test_lazy_inputs_follow_the_options(processor, make_image, options, tiles):
    call = {"images": make_image(0), "text": "<image>what?", **options}
    call |= {} if "text_kwargs" in options else {"return_tensors": "pt"}
    eager, lazy = processor(**call), processor(**call, lazy_tiles=True)
    assert lazy["lazy_tiles"].counts == [tiles] and torch.equal(eager["input_ids"], lazy["input_ids"])


def test_options_that_lazy_tiles_do_not_follow_are_refused(processor, make_image):
    call = {"images": make_image(0), "text": "<image>what?", "lazy_tiles": True}
    with pytest.raises(ValueError, match="supports size and do_image_splitting, not do_normalize"):
        processor(**call, do_normalize=False)
    with pytest.raises(ValueError, match="not max_image_size"):
        processor(**call, images_kwargs={"max_image_size": {"longest_edge": 32}})


@pytest.mark.parametrize("name", ["max_tiles", "return_mm_token_type_ids", "common_kwargs", "image_seq_len"])
@pytest.mark.parametrize("place", [None, "text_kwargs"])
def test_options_that_nobody_reads_are_refused(name, place, processor, make_image):
    options = {name: 2} if place is None else {place: {name: 2}}
    with pytest.raises(ValueError, match=f"lazy_tiles: unknown options {name}"):
        processor(images=make_image(0), text="<image>what?", lazy_tiles=True, **options)


def test_batches_join(processor, make_image):
    images = [[make_image(0)], [make_image(1), make_image(2, 64, 128)]]
    texts = ["<image>what?", "<image><image>what?"]
    parts = [
        processor(text=[text], images=[sample], return_tensors="pt", lazy_tiles=True)["lazy_tiles"]
        for text, sample in zip(texts, images)
    ]
    whole = processor(text=texts, images=images, padding=True, return_tensors="pt", lazy_tiles=True)["lazy_tiles"]
    joined = LazyTiles.join(parts)
    assert joined.counts == whole.counts == [17, 17 + 9] and parts[0].counts == [17]
    places = [0, 1, 1], [3, 0, 20]
    assert torch.equal(joined.cut(*places), whole.cut(*places))


def test_lazy_inputs_move_with_the_batch(processor, make_image):
    inputs = processor(images=make_image(), text="<image>what?", return_tensors="pt", lazy_tiles=True).to("cpu")
    assert torch.is_tensor(inputs["pixel_values"]) and inputs["lazy_tiles"].counts == [17]


def test_a_wrong_number_of_images_is_named(processor, make_image):
    call = {"text": ["<image>what?", "<image>why?"], "padding": True, "lazy_tiles": True}
    with pytest.raises(ValueError, match="prompts name 2 images, but 1 are given"):
        processor(images=[make_image()], **call)
    with pytest.raises(ValueError, match=r"prompts name \[1, 1\] images, but \[2, 0\] are given"):
        processor(images=[[make_image(), make_image()], []], **call)


# Opened images


def test_an_opened_image_gives_the_same_inputs_without_scaling_again(processor, make_image, monkeypatch):
    """As long as the image itself, and for several questions and images in a batch."""
    text = ["<image>what is it?", "<image>and<image>now?"]
    first, second = make_image(0), make_image(1, 256, 64)
    call = {"text": text, "padding": True, "return_tensors": "pt"}
    expected = processor(images=[[first], [second, first]], **call, lazy_tiles=True)
    opened, other = processor.open(first), processor.open(second)
    assert processor.open(opened) is opened
    monkeypatch.setattr(tiles_qgsa, "scale_by_pil", lambda *args: pytest.fail("scaled again"))
    processor(text=text[0], images=opened)
    monkeypatch.undo()
    found = processor(images=[[opened], [other, opened]], **call)
    assert found.keys() == expected.keys() and found["lazy_tiles"].counts == expected["lazy_tiles"].counts
    for name in ("input_ids", "attention_mask", "question_mask", "pixel_values"):
        assert torch.equal(found[name], expected[name])
    places = [0, 1, 1], [3, 0, 20]
    assert torch.equal(found["lazy_tiles"].cut(*places), expected["lazy_tiles"].cut(*places))
    assert found["lazy_tiles"].key(1, 2) == expected["lazy_tiles"].key(1, 2)


@pytest.mark.parametrize("options", [{}, {"size": {"longest_edge": 128}}, {"do_image_splitting": False}])
def test_an_image_is_opened_as_the_processor_would_cut_it(options, processor, make_image):
    call = {"text": "<image>what is it?", "return_tensors": "pt"}
    expected = processor(images=make_image(0), **call, **options, lazy_tiles=True)
    found = processor(images=processor.open(make_image(0), **options), **call)
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


def test_opened_images_that_cannot_be_prepared_are_refused(processor, make_image):
    opened, text = processor.open(make_image(0)), "<image>what is it?"
    with pytest.raises(ValueError, match=r"text \(None\): images that were opened"):
        processor(images=opened)
    with pytest.raises(ValueError, match=r"lazy_tiles \(False\): images that were opened"):
        processor(images=[[opened]], text=[text], lazy_tiles=False)
    with pytest.raises(ValueError, match=r"size \(\{'longest_edge': 128\}\): the image was scaled when it was opened"):
        processor(images=opened, text=text, size={"longest_edge": 128})
    other = copy.deepcopy(processor)
    other.image_processor.max_image_size = {"longest_edge": 32}
    with pytest.raises(ValueError, match="opened for tiles of 64 px, but those of this processor have 32"):
        other(images=opened, text=text)
    other = QGSAProcessor.from_pretrained(TINY, backend="torchvision")
    with pytest.raises(ValueError, match="opened, and scaled, by PIL, but this processor scales by torchvision"):
        other(images=opened, text=text)
    with pytest.raises(ValueError, match=r"size \(5\) must be"):
        processor.open(make_image(0), size=5)
    for nothing in (None, [make_image(0)]):
        with pytest.raises(TypeError, match=rf"image \({type(nothing).__name__}\) must be a single image"):
            processor.open(nothing)
    with pytest.raises(ValueError, match="2 x 400 px"):
        processor.open(Image.new("RGB", (2, 400)))
