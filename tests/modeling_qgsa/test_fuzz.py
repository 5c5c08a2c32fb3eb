"""Broken and hostile inputs: every one of them ends in a clear error or in a right answer, and soon."""

import io
import json
import pickle
import re
import shutil
import signal
import traceback
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from broken_inputs import (
    bombs,
    broken_prompts,
    deep_pictures,
    encode,
    false_files,
    flipped_files,
    odd_arrays,
    odd_modes,
    odd_questions,
    odd_tensors,
    picture,
    truncated_files,
    wrong_addresses,
    wrong_images,
    wrong_texts,
)
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import SmolVLMForConditionalGeneration
from transformers.utils import is_torchvision_available

from modeling_qgsa import QGSAConfig, QGSAProcessor, QGSASmolVLMForConditionalGeneration
from modeling_qgsa.configuration_qgsa import Budget


SECONDS = 30  # of the clock: tests may share a busy machine
CLEAR = (ValueError, TypeError, OSError, StrictDataclassError)
OPAQUE = re.compile(
    "'NoneType' object|is not (iterable|subscriptable|callable)|unsupported operand|has no attribute|out of range$"
    "|has no len|empty sequence|not supported between|must be Tensor|unpack|positional argument|object cannot be"
    "|setting an array element|Cannot handle this data type|only integer|must match the size|truth value|ufunc"
    "|^.{0,11}$"
)
SELECTIONS = ("before_encoder", "after_encoder", "blocks", "dense")
ASK = "<|im_start|>User:{}what is it?<end_of_utterance>\nAssistant:"
# Errors of stock transformers that say what is wrong, in types that are not ours to choose.
STOCK = [
    r"^folders: .*(SafetensorError|UnpicklingError|JSON|ignore_mismatched_sizes|`kernels` is)",
    r"^folders: config.json: (a number|null|dtype unknown):",
    r"^folders: (processor_config|tokenizer|tokenizer_config).json: a list:",
    r"^options: (images_kwargs|text_kwargs) ",
]


class Wrong(Exception):
    """An answer that is not right."""


class Late(BaseException):
    """A case that takes too long."""


def check(true, message):
    if not true:
        raise Wrong(message)


def judge(call) -> str:
    """The problem with how a case ends; "" if there is none."""

    def too_late(*_):
        raise Late

    before = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        call()
    except Wrong as error:
        return f"wrong: {error}"
    except Late:
        return f"takes more than {SECONDS} s"
    except CLEAR as error:
        message = str(error)
        if traceback.extract_tb(error.__traceback__)[-1].filename == __file__:
            return f"the test itself fails: {type(error).__name__}: {message[:200]}"
        return f"unclear {type(error).__name__}: {message[:200]}" if OPAQUE.search(message) else ""
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return ""


def refused(call):
    """A case for which no answer can be right."""

    def checked():
        result = call()
        raise Wrong(f"not refused: {str(result)[:100]}")

    return checked


def answered(call):
    """A case that has a right answer: no error will do."""

    def checked():
        try:
            call()
        except CLEAR as error:
            raise Wrong(f"refused: {type(error).__name__}: {str(error)[:200]}") from error

    return checked


@dataclass
class Bench:
    """A processor and a model, with checks of everything they return."""

    processor: QGSAProcessor
    model: QGSASmolVLMForConditionalGeneration
    folder: Path
    dense: SmolVLMForConditionalGeneration | None = None
    lazy: bool = False

    def process(self, images, text=None, **options):
        text = ASK.format("<image>") if text is None else text
        options = {"padding": True, "return_tensors": "pt", "lazy_tiles": self.lazy} | options
        return self.processor(text=text, images=images, **options)

    def pixels(self, inputs) -> torch.Tensor:
        """Pixels of all tiles of the first sample."""
        if inputs.get("lazy_tiles") is None:
            return inputs["pixel_values"][0]
        count = inputs["lazy_tiles"].counts[0]
        return inputs["lazy_tiles"].cut([0] * count, list(range(count)))

    def show(self, images, clean=None, text=None, **options):
        """Process and answer; the pixels have to be those of `clean`, a picture, up to rounding."""
        inputs = self.process(images, text, **options)
        sizes = None if clean is None else [[clean.size]]
        self.check_inputs(inputs, sizes)
        if clean is not None:
            expected = self.processor(text=ASK.format("<image>"), images=clean, return_tensors="pt")["pixel_values"][0]
            pixels = self.pixels(inputs)
            check(pixels.shape == expected.shape, f"pixels {tuple(pixels.shape)}, expected {tuple(expected.shape)}")
            gap = (pixels - expected).abs().max().item() * 127.5
            check(gap < 4, f"pixels are {gap:.0f} of 255 off")
        self.answer(inputs)
        return inputs

    def check_inputs(self, inputs, sizes=None):
        """As many placeholders as tiles, as many tiles as the images need, and a question within the text."""
        ids, own = inputs["input_ids"], self.processor
        placeholders = (ids == own.image_token_id).sum(1).tolist()
        tiles = [0] * len(ids)
        if inputs.get("lazy_tiles") is not None:
            tiles = inputs["lazy_tiles"].counts
        elif inputs.get("pixel_values") is not None:
            tiles = (inputs["pixel_values"] != 0).flatten(2).any(-1).sum(1).tolist()
        check([16 * count for count in tiles] == placeholders, f"{placeholders} placeholders for {tiles} tiles")
        if inputs.get("pixel_values") is not None:
            check(inputs["pixel_values"].isfinite().all(), "pixels are not finite")
            mask = inputs["question_mask"]
            check(mask.shape == ids.shape and (mask <= inputs["attention_mask"]).all(), "question_mask does not fit")
        if sizes is not None:
            cut = own.image_processor.get_number_of_image_patches
            wanted = [sum(max(cut(height, width)[0], 1) for width, height in sample) for sample in sizes]
            check(tiles == wanted, f"{tiles} tiles, expected {wanted}")

    def answer(self, inputs, selection=None, **options):
        """Select and generate one token."""
        variant = selection or self.model.config.selection
        if inputs.get("pixel_values") is not None and variant != "dense":
            self.check_selection(self.model.select(**inputs, selection=selection, **options), inputs, variant, options)
        ids = self.model.generate(**inputs, max_new_tokens=1, selection=selection, **options)
        length = inputs["input_ids"].shape[1]
        check(ids.shape == (len(inputs["input_ids"]), length + 1), f"{tuple(ids.shape)} ids of {length} and 1")
        check(torch.equal(ids[:, :length], inputs["input_ids"]), "the prompt came back changed")
        return ids

    def forward(self, inputs, **options):
        """One forward pass, whose logits must be finite."""
        with torch.no_grad():
            logits = self.model(**inputs, **options).logits
        check(logits.isfinite().all(), "logits are not finite")

    def like_stock(self, inputs):
        """The stock model and "dense" do the same with the inputs, even if that is an error."""
        ends = []
        stock = {name: value for name, value in inputs.items() if name != "question_mask"}
        for model, given in ((self.dense, stock), (self.model, inputs | {"selection": "dense"})):
            try:
                ends.append(model.generate(**given, max_new_tokens=1).tolist())
            except Exception:
                ends.append("an error")
        check(ends[0] == ends[1], f"stock {str(ends[0])[-40:]}, dense {str(ends[1])[-40:]}")

    def check_selection(self, selection, inputs, variant, options):
        """Counts agree with the budget, the masks and the positions that are left."""
        names = ("min_visual_tokens", "max_visual_tokens", "min_tiles", "max_tiles")
        budget = Budget.of(self.model.config, **{name: options[name] for name in names if name in options})
        check(selection.relevance.isfinite().all(), "relevance is not finite")
        check(((selection.complexity >= 0) & (selection.complexity <= 1)).all(), "complexity beyond 0 .. 1")
        kept = [0] * len(inputs["input_ids"])
        encoded = list(kept)
        owner = selection.image_sample
        marked, asked = inputs.get("question_mask"), None
        if marked is not None and "visual_token_scores" not in {*options, *inputs}:
            asked = marked.bool().any(1)[owner]
        counts = budget.resolve(selection.complexity, asked)
        for (rows, columns), sample, m, k in zip(selection.grids.tolist(), owner.tolist(), *counts):
            count = rows * columns if variant == "after_encoder" else min(int(m), rows * columns)
            kept[sample] += min(int(k), 16 * (count + 1))
            encoded[sample] += count
        check(selection.visual_tokens.tolist() == kept, f"kept {selection.visual_tokens.tolist()}, expected {kept}")
        if variant != "blocks":
            check(selection.tiles.tolist() == encoded, f"encoded {selection.tiles.tolist()}, expected {encoded}")
        check(torch.equal(selection.kept_tokens.sum(1), selection.visual_tokens), "kept tokens are counted otherwise")
        left = selection.keep_indices
        is_visual = inputs["input_ids"].gather(1, left.clamp(min=0)) == self.processor.image_token_id
        check((is_visual & (left >= 0)).sum(1).tolist() == kept, "positions left are not those counted")


@pytest.fixture(scope="module")
def bench(processor, model, make_dense, tmp_path_factory):
    return Bench(processor, model, tmp_path_factory.mktemp("fuzz"), make_dense())


# 1 and 2: files


def decoded(data: bytes):
    """The image that PIL reads from a file, in the colours that the processor must see; None if it cannot."""
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except Exception:
        return None


def of_files(bench, files):
    """Files as paths, and as images that PIL has opened but not yet read."""
    for number, (name, data) in enumerate(files):
        path = bench.folder / f"{number}.png"
        path.write_bytes(data)

        def opened(path=path, data=data):
            try:
                image = Image.open(path)
            except Exception:
                return  # refused in the caller's own code
            bench.show(image, None if "A" in image.getbands() or "transparency" in image.info else decoded(data))

        def given(path=path, data=data):
            bench.show(str(path), decoded(data))

        yield f"{name}, path", given
        yield f"{name}, opened", opened


def of_bombs(bench):
    yield from of_files(bench, bombs())
    many = encode(Image.new("1", (6000, 6000)), "PNG")
    path = bench.folder / "many.png"
    path.write_bytes(many)
    yield "36 million pixels of one bit", partial(bench.show, str(path))
    huge = np.broadcast_to(np.uint8(0), (30000, 30000, 3))
    yield "array of 900 million pixels", refused(partial(bench.show, huge))
    yield "tensor of 900 million pixels", refused(partial(bench.show, torch.zeros(1, 1, 1).expand(3, 30000, 30000)))


# 3: modes and dtypes


def of_modes(bench):
    for name, image in odd_modes():

        def shown(image=image):
            stock = super(QGSAProcessor, bench.processor).__call__(
                images=image, text=ASK.format("<image>"), return_tensors="pt"
            )
            inputs = bench.show(image)
            check(torch.equal(bench.pixels(inputs), stock["pixel_values"][0]), "pixels are not the stock processor's")

        yield name, shown if name.startswith("mode La") else answered(shown)  # PIL cannot convert it
    for name, image, clean in deep_pictures():  # some fit into 8 bits
        yield name, partial(bench.show, image, clean)


def of_arrays(bench, arrays):
    for name, array, clean in arrays:
        for form, images in (("", array), (", in a list", [array])):
            call = partial(bench.show, images, clean)
            yield name + form, answered(call) if clean is not None else refused(call)


def of_torchvision(bench):
    """Arrays for the image processor that transformers takes where torchvision is installed."""
    if not is_torchvision_available() or not hasattr(transformers, "Idefics3ImageProcessorPil"):
        return
    sizes = {"size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 64}}
    image_processor = transformers.Idefics3ImageProcessor(**sizes)
    processor = QGSAProcessor(image_processor, bench.processor.tokenizer, image_seq_len=16)
    yield from of_arrays(replace(bench, processor=processor), odd_arrays())


# 4: counts


def flat(images) -> list:
    if isinstance(images, list | tuple):
        return [image for each in images for image in flat(each)]
    return [images]


def of_counts(bench):
    for name, text, images in wrong_images():
        if images == "generator":
            images = (picture(7) for _ in range(1))
        if images == "file":
            images = io.BytesIO(encode(picture(7), "PNG"))
        texts = [text] if isinstance(text, str) else text
        named = [prompt.count("<image>") for prompt in texts]
        found = flat(images)
        fits = all(isinstance(image, Image.Image) for image in found) and len(found) == sum(named)
        call = partial(bench.show, images, None, text)
        if images is None:
            fits = not sum(named)
        elif fits and isinstance(images, list | tuple) and any(isinstance(each, list | tuple) for each in images):
            fits = [len(each) if isinstance(each, list | tuple) else -1 for each in images] == named
        elif not texts:
            fits = False

        def counted(call=call, named=named):
            inputs = call()
            globals_ = (inputs["input_ids"] == bench.processor.global_image_token_id).sum(1).tolist()
            check(globals_ == named, f"{globals_} images where {named} are named")

        nothing = texts and not sum(named) and all(image is None for image in found)
        deep = "deep" in name  # lists in lists in lists: flattened or refused
        yield name, counted if deep and fits else (answered if fits or nothing else refused)(counted)


# 5: text


def of_questions(bench):
    tokenizer = bench.processor.tokenizer
    for name, question in odd_questions():
        forms = ("<|im_start|>User:<image>{}<end_of_utterance>\nAssistant:", "<image>{}")
        for form in forms[: 2 - bench.lazy]:

            def asked(question=question, form=form):
                inputs = bench.show(picture(10), None, form.replace("{}", question))
                read = tokenizer.decode(inputs["input_ids"][0][inputs["question_mask"][0].bool()])
                whole = tokenizer.decode(tokenizer(question)["input_ids"])
                blank = re.sub("<[^>]*>", "", question).strip() == ""
                turns = "<end_of_utterance>" in question  # markers are markers, whoever writes them
                check(blank or turns or read.strip().endswith(whole.strip()), f"read {read!r} of {whole!r}")

            if "<image>" in question:
                yield f"{name}, {form[:9]}", refused(asked)
            else:  # markers and halves of letters may not be there to be read
                blank = re.sub("<[^>]*>", "", question).strip() == ""
                odd = blank or "<end_of_utterance>" in question or "Assistant:" in question or "surrogate" in name
                yield f"{name}, {form[:9]}", asked if odd else answered(asked)


def of_texts(bench):
    for name, text in wrong_texts():
        accepted = name in ("tuple", "array of texts")
        call = partial(bench.show, picture(11), None, text)
        yield name, (answered if accepted else refused)(call)
        alone = partial(bench.processor, text=text, return_tensors="pt")
        yield f"{name}, no image", refused(alone)  # although the text names one
    yield "no text", answered(partial(bench.processor, images=picture(11)))
    yield "nothing", refused(partial(bench.processor))
    long = "<image>" + "what is it? " * 8500
    yield "100 000 letters", answered(lambda: bench.check_inputs(bench.process(picture(11), long)))
    turns = "User: is it red?<end_of_utterance>\nAssistant: no<end_of_utterance>\n" * 3000
    many = "User:<image>" + turns + "User: why?"
    yield "3000 turns", answered(lambda: bench.check_inputs(bench.process(picture(11), many)))
    limit = bench.model.config.text_config.max_position_embeddings

    def too_long(question):
        inputs = bench.process(picture(11), ASK.format("<image>") if question is None else question)
        check(inputs["input_ids"].shape[1] > limit, "the prompt is too short for this test")
        bench.answer(inputs)

    # Positions are rotated, so that there is no last one, as in the stock model.
    yield "beyond max_position_embeddings", answered(partial(too_long, "<image>" + "what is it? " * 400))
    truncated = {"truncation": True, "max_length": 40}
    yield "truncated within the image", refused(partial(bench.show, picture(11), **truncated))


def of_options(bench):
    for name, values in {
        "size": (
            {"longest_edge": 0},
            {"longest_edge": -5},
            {"longest_edge": 1},
            {"longest_edge": "256"},
            {},
            256,
            "x",
        ),
        "do_image_splitting": ("yes", 0, [], 1.5),
        "padding": ("no", 5, "longest", -1),
        "return_tensors": ("tf", "xx", 5),
        "max_length": (-1, "x", 0),
        "image_seq_len": (5, 0, -1, "x"),
        "unknown_option": (1,),
        "lazy_tiles": ("yes", 2, None),
        "resample": (99, "x"),
        "max_image_size": ({"longest_edge": 0}, {"longest_edge": 32}, {}, 5),
    }.items():
        for value in values:
            yield f"{name} {value!r}", partial(bench.show, picture(12), **{name: value})

    def as_arrays():
        inputs = bench.process(picture(12), return_tensors="np")
        kinds = {name: type(inputs[name]).__name__ for name in ("input_ids", "attention_mask", "question_mask")}
        check(set(kinds.values()) == {"ndarray"}, kinds)

    yield "return_tensors 'np'", answered(as_arrays)
    for edge in (64, 65, 384, 385, 1000):
        call = partial(bench.show, picture(12), size={"longest_edge": edge})
        yield f"size of {edge}", (answered if edge <= 384 else refused)(call)  # there are markers of 6 x 6 tiles
    yield "images_kwargs a number", partial(bench.show, picture(12), images_kwargs=5)
    yield "text_kwargs a list", partial(bench.show, picture(12), text_kwargs=[1])


# 6: addresses


def of_addresses(bench):
    for name, address in wrong_addresses(bench.folder):
        yield name, refused(partial(bench.show, address))
        yield f"{name}, in lists", refused(partial(bench.show, [[address]]))


# 7: tensors


def of_prompts(bench, selection):
    inputs = dict(bench.process(picture(13, 64, 64)))
    own = bench.processor
    markers = {
        "image": own.image_token_id,
        "global": own.global_image_token_id,
        "fake": own.fake_image_token_id,
        "tiles": own.row_col_ids,
    }
    for name, row in broken_prompts(inputs["input_ids"], markers):
        ids = torch.tensor([row], dtype=torch.long)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"]}
        given |= {"pixel_attention_mask": inputs.get("pixel_attention_mask")}
        if bench.lazy:
            given |= {"lazy_tiles": inputs["lazy_tiles"]}
        if selection == "dense":
            yield name, partial(bench.like_stock, given)
            continue
        call = partial(bench.answer, given, selection)
        yield name, call if name == "all tiles called global" and not bench.lazy else refused(call)


def of_tensors(bench, selection):
    """Tensors that do not fit, one at a time, in a batch of two."""
    texts = [ASK.format("<image>"), "<|im_start|>User:<image>where?<end_of_utterance>\nAssistant:"]
    inputs = dict(bench.process([[picture(14)], [picture(15, 64, 16)]], texts))
    count = (inputs["input_ids"] == bench.processor.image_token_id).sum(1).max().item()
    ids, pixels, mask = inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]
    length = ids.shape[1]

    def holed(tensor, value, *where):
        new = tensor.clone()
        new[where] = value
        return new

    first = (ids[0] == bench.processor.image_token_id).nonzero()[0, 0].item()
    last_words = mask.clone()
    last_words[:, -3] = 0
    scores = torch.randn(2, count)
    wrong = {
        "pixel_values": {
            "None": None,
            "a list": pixels.tolist()[0][0][0],
            "NaN": holed(pixels, float("nan"), 0, 0, 0, 0, 0),
            "infinite": holed(pixels, float("inf"), 1, -1, 2, 3, 3),
            "all zero": torch.zeros_like(pixels),
            "one tile less": pixels[:, 1:],
            "last tile less": pixels[:, :-1],
            "one tile more": torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1),
            "no tile": pixels[:, :0],
            "one sample": pixels[:1],
            "three samples": torch.cat([pixels, pixels[:1]]),
            "no sample": pixels[:0],
            "one channel": pixels[:, :, :1],
            "four channels": torch.cat([pixels, pixels[:, :, :1]], 2),
            "channels last": pixels.permute(0, 1, 3, 4, 2),
            "half the size": pixels[..., ::2, ::2],
            "twice the size": pixels.repeat(1, 1, 1, 2, 2),
            "a row less": pixels[..., :-1, :],
            "not square": pixels[..., : pixels.shape[-1] // 2],
            "4-d": pixels[0],
            "3-d": pixels[0, 0],
            "6-d": pixels[None],
            "uint8": (pixels * 100 + 100).to(torch.uint8),
            "int64": (pixels * 100).long(),
            "bool": pixels > 0,
            "complex": pixels.to(torch.complex64),
            "array": pixels.numpy(),
            "tile zeroed": holed(pixels, 0, 0, 0),
        },
        "pixel_attention_mask": {
            "a tile less": torch.ones(2, pixels.shape[1] - 1, 64, 64),
            "one sample": torch.ones(1, pixels.shape[1], 64, 64),
            "half the size": torch.ones(2, pixels.shape[1], 32, 32),
            "2-d": torch.ones(2, 64),
            "a list": [[1]],
        },
        "input_ids": {
            "None": None,
            "1-d": ids[0],
            "3-d": ids[None],
            "floats": ids.float(),
            "bools": ids.bool(),
            "a list": ids.tolist(),
            "one sample": ids[:1],
            "no sample": ids[:0],
            "no token": ids[:, :0],
            "samples exchanged": ids.flip(0),
            "out of vocabulary": holed(ids, 10**6, 0, -2),
            "just out of vocabulary": holed(ids, 512 + 7, 1, -1),
            "below 0": holed(ids, -1, 0, -1),
            "padded with -100": torch.cat([torch.full_like(ids[:, :1], -100), ids], 1),
        },
        "attention_mask": {
            "one less": mask[:, 1:],
            "one more": torch.cat([mask, mask[:, :1]], 1),
            "1-d": mask[0],
            "one sample": mask[:1],
            "4-d": torch.ones(2, 1, length, length),
            "all 0": torch.zeros_like(mask),
            "a sample of 0": holed(mask, 0, 1),
            "NaN": torch.full(mask.shape, float("nan")),
            "below 0": -mask,
            "twos": 2 * mask,
            "a list": mask.tolist(),
            "hole in a tile": holed(mask, 0, 0, first + 3),
            "hole over a tile": holed(mask, 0, 0, slice(first, first + 16)),
            "only the tiles": (ids == bench.processor.image_token_id).long(),
        },
        "position_ids": {
            "one less": torch.arange(length - 1)[None],
            "three samples": torch.arange(length).expand(3, -1),
            "floats": torch.arange(length)[None] / 3,
            "a list": list(range(length)),
        },
        "question_mask": {
            "one less": inputs["question_mask"][:, 1:],
            "one more": torch.cat([inputs["question_mask"], inputs["question_mask"][:, :1]], 1),
            "1-d": inputs["question_mask"][0],
            "one sample": inputs["question_mask"][:1],
            "three samples": inputs["question_mask"][[0, 1, 0]],
            "one column": torch.ones(2, 1),
            "number": torch.tensor(1),
            "a list": inputs["question_mask"].tolist(),
            "tiles only": (ids == bench.processor.image_token_id).long(),
            "text": "what?",
        },
        "visual_token_scores": {
            "one less": scores[:, 1:],
            "one more": torch.randn(2, count + 1),
            "one sample": scores[:1],
            "1-d": scores[0],
            "3-d": scores[None],
            "none at all": scores[:, :0],
            "NaN": holed(scores, float("nan"), 0, 0),
            "infinite": holed(scores, float("-inf"), 1, 2),
            "complex": scores.to(torch.complex64),
            "a list": scores.tolist(),
            "number": 1.0,
            "text": "best",
        },
        "image_hidden_states": {
            "one tile": torch.randn(1, 16, 32),
            "tokens less": torch.randn(7, 15, 32),
            "narrow": torch.randn(count // 16 * 2, 16, 31),
            "2-d": torch.randn(7, 16),
            "NaN": torch.full((7, 16, 32), float("nan")),
            "text": "seen",
        },
        "visual_cache": {"text": "yes", "dict": {}, "number": 1},
        "lazy_tiles": {"text": "yes", "list": [1, 2], "number": 5, "True": True},
    }
    fine = {
        "pixel_values": {"float64": pixels.double(), "bfloat16": pixels.bfloat16(), "not contiguous": pixels.flip(3)},
        "attention_mask": {"bool": mask.bool(), "float": mask.float(), "int32": mask.int(), "None": None},
        "question_mask": {
            "float": inputs["question_mask"].float(),
            "None": None,
            "all 1": torch.ones_like(ids),
            "all 0": torch.zeros_like(ids),
            "a sample of 0": holed(inputs["question_mask"], 0, 0),
        },
        "visual_token_scores": {
            "int": scores.long(),
            "float64": scores.double(),
            "huge": scores * 1e37,
            "equal": 0 * scores,
        },
        "input_ids": {"int32": ids.int()},
        "position_ids": {"1-d": torch.arange(length), "one sample": torch.arange(length)[None]},
    }
    without = {name: {"left out": None} for name in ("attention_mask", "question_mask")}
    for kind, table in (("refused", wrong), ("fine", fine), ("fine", without)):
        for field, values in table.items():
            if field == "pixel_attention_mask" and bench.lazy:
                continue  # lazy tiles are full: a mask is not read
            for name, value in values.items():
                given = inputs | {field: value}

                def call(given=given):
                    if given["input_ids"] is None:
                        return bench.model.generate(**given, selection=selection, max_new_tokens=1)
                    bench.answer(given, selection)
                    bench.forward(given, selection=selection)

                if selection == "dense":
                    if field in ("input_ids", "attention_mask") or field == "pixel_values" and value is not None:
                        yield f"{field}: {name}", partial(bench.like_stock, given)
                    continue
                yield f"{field}: {name}", (answered if kind == "fine" else refused)(call)


def of_labels(bench):
    """Labels that do not fit, in evaluation, where the selector does not read labelled tokens."""
    inputs = dict(bench.process(picture(14)))
    ids = inputs["input_ids"]
    end = torch.full_like(ids, -100)
    end[:, -2:] = ids[:, -2:]
    wrong = {
        "one less": end[:, 1:],
        "one more": torch.cat([end, end[:, :1]], 1),
        "1-d": end[0],
        "two samples": torch.cat([end, end]),
        "floats": end.float(),
        "a list": end.tolist(),
        "beyond the vocabulary": torch.where(end > 0, 10**6, end),
        "below 0": torch.where(end > 0, -5, end),
    }
    fine = {"the end": end, "everything": ids, "zeros": torch.zeros_like(ids)}
    for selection in SELECTIONS[:3]:
        for name, labels in wrong.items():
            yield (
                f"{name}, {selection}",
                refused(partial(bench.forward, inputs | {"labels": labels}, selection=selection)),
            )
        for name, labels in fine.items():
            call = partial(bench.forward, inputs | {"labels": labels}, selection=selection)
            yield f"{name}, {selection}", answered(call)


def of_padding(bench):
    """Padding on the right gives the same answers as padding on the left."""
    texts = [ASK.format("<image>"), "<|im_start|>User:<image>is it a red or a blue one?<end_of_utterance>\nAssistant:"]
    images = [[picture(14, 64, 64)], [picture(15, 64, 16)]]
    left = dict(bench.process(images, texts))
    for selection in SELECTIONS[:3]:

        def padded(selection=selection):
            expected = bench.answer(left, selection)[:, -1]
            right = dict(bench.process(images, texts, padding_side="right"))
            check(right["attention_mask"][1, -1] == 0, "not padded on the right")
            check(torch.equal(bench.answer(right, selection)[:, -1], expected), "another answer")

        yield selection, answered(padded)


def of_budgets(bench):
    inputs = dict(bench.process(picture(16)))
    bad = ("4", "", -1, -(10**9), 1.5, float("nan"), float("inf"), [4], {}, (1, 2), torch.tensor([1, 2]), "max", 1j)
    bad += (10**30, object(), np.nan, b"4")
    for name in ("min_visual_tokens", "max_visual_tokens", "min_tiles", "max_tiles"):
        for value in bad:
            for selection in ("before_encoder", "blocks"):
                call = partial(bench.answer, inputs, selection, **{name: value})
                yield f"{name} {value!r:.30}, {selection}", refused(call)
        for value in (10**9, 2**31 - 1, None, np.int64(5)):
            budget = {"min_visual_tokens": 1, "min_tiles": 0, "max_visual_tokens": 2**31 - 1, "max_tiles": 2**31 - 1}
            call = partial(bench.answer, inputs, **(budget | {name: value}))
            yield f"{name} {value!r}", answered(call)
    for selection in ("", "Dense", "all", 5, b"dense", ["dense"], ("dense",), True, 1.5, {}, "before_encoder "):
        yield f"selection {selection!r}", refused(partial(bench.answer, inputs, selection))
    yield "unknown option", refused(partial(bench.answer, inputs, max_tokens=5))
    yield "selection in select is dense", refused(partial(bench.model.select, **inputs, selection="dense"))
    for value in (0, -1, 1.5, "2", float("nan"), True):
        yield f"tune {value!r}", refused(partial(bench.model.tune, tiles_per_step=value))


# 9: configurations and folders


def of_configs(bench):
    base = bench.model.config.to_dict()
    base["text_config"] |= {"num_hidden_layers": 1}
    base["vision_config"] |= {"num_hidden_layers": 1}
    base["selector_layers"] = 1
    values = (None, "x", -1, 0, 1.5, float("nan"), True, [1], {})
    own = [name for name in QGSAConfig.__annotations__ if name != "model_type"]
    for name in [*own, "scale_factor", "text_config", "vision_config", "tie_word_embeddings", "pad_token_id"]:
        for value in values:
            if name not in ("text_config", "vision_config") or value:  # without one it is SmolVLM's own, and large
                yield f"{name} {value!r:.30}", partial(built, bench, base | {name: value})
        if re.search("_tiles$|_visual_tokens$|_id$", name):
            yield f"{name} 10**30", partial(built, bench, base | {name: 10**30})
    ids = base["tile_token_ids"]
    for name, value in {
        "35 ids": ids[1:],
        "twice the same id": [ids[0], *ids[:-1]],
        "ids below 0": [-1, *ids[1:]],
        "ids of floats": [1.5, *ids[1:]],
        "ids beyond the vocabulary": [10**6, *ids[1:]],
    }.items():
        yield f"tile_token_ids: {name}", refused(partial(built, bench, base | {"tile_token_ids": value}))
    for part, changes in {
        "vision_config": {"patch_size": (0, -8, 7, "8", None), "image_size": (0, -64, 8, "64", None)},
        "text_config": {"vocab_size": (0, -1, "512", None), "hidden_size": (0, 30, "x", None)},
    }.items():
        for name, values in changes.items():
            for value in values:
                fields = base | {part: base[part] | {name: value}}
                yield f"{part}.{name} {value!r}", refused(partial(built, bench, fields))
    yield "unknown field", partial(built, bench, base | {"no_such_field": 1})
    yield "another model_type", partial(built, bench, base | {"model_type": "llama"})
    yield "two fields the same", refused(partial(built, bench, base | {"global_image_token_id": ids[0]}))
    yield (
        "image token is global",
        refused(partial(built, bench, base | {"global_image_token_id": base["image_token_id"]})),
    )


def built(bench, fields):
    """A configuration that is accepted makes a model that answers."""
    config = QGSAConfig.from_dict(fields)
    Budget.of(config)
    model = QGSASmolVLMForConditionalGeneration._from_config(config).eval()
    if config.tokens_per_tile == 16:
        model.generation_config.pad_token_id = 0
        model.generate(**bench.process(picture(17, 32, 32)), max_new_tokens=1)
    return config


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return (open, (self.flag, "w"))


def of_folders(bench):
    good = bench.folder / "good"
    bench.model.save_pretrained(good)
    bench.processor.save_pretrained(good)
    flag = bench.folder / "executed"
    number = iter(range(1000))

    def copy(**files):
        """A copy of the good folder with files changed; None removes one."""
        folder = bench.folder / f"folder{next(number)}"
        shutil.copytree(good, folder)
        for name, data in files.items():
            path = folder / name.replace("__", ".")
            path.unlink(missing_ok=True)
            if data is not None:
                path.write_bytes(data.encode() if isinstance(data, str) else data)
        return folder

    def load(folder):
        try:
            model = QGSASmolVLMForConditionalGeneration.from_pretrained(folder)
        finally:
            executed = flag.exists()
            flag.unlink(missing_ok=True)
            check(not executed, "code of the checkpoint was executed")
        Bench(bench.processor, model.eval(), bench.folder).show(picture(18))
        return model

    def load_all(folder):
        QGSAProcessor.from_pretrained(folder)
        return load(folder)

    def same(folder):
        model = load(folder)
        weights = model.state_dict()
        for name, weight in bench.model.state_dict().items():
            check(torch.equal(weights[name], weight), f"{name} differs")

    config = json.loads((good / "config.json").read_text())
    weights = (good / "model.safetensors").read_bytes()
    evil = f"open({str(flag)!r}, 'w').close()\nraise SystemExit\n"
    bad_map = {name: f"evil.{value.split('.')[1]}" for name, value in config["auto_map"].items()}

    yield "as it was saved", lambda: same(copy())
    for name, text in {
        "empty": "",
        "cut": json.dumps(config)[:200],
        "a list": "[]",
        "a number": "5",
        "null": "null",
        "no object": "{}",
        "binary": b"\xff\xfe\x00",
        "deep": "[" * 100000,
        "two": json.dumps(config) * 2,
        "no model_type": json.dumps({key: value for key, value in config.items() if key != "model_type"}),
        "model_type a list": json.dumps(config | {"model_type": ["x"]}),
        "another model": json.dumps({"model_type": "llama"}),
        "dtype unknown": json.dumps(config | {"dtype": "float99"}),
        "architecture unknown": json.dumps(config | {"architectures": ["Evil"]}),
        "quantised": json.dumps(config | {"quantization_config": {"quant_method": "evil"}}),
        "attention unknown": json.dumps(config | {"_attn_implementation": "evil/kernel"}),
    }.items():
        accepted = name in ("architecture unknown", "no model_type", "quantised")
        call = partial(lambda text: load(copy(config__json=text)), text)
        yield f"config.json: {name}", call if accepted else refused(call)
    yield (
        "auto_map to other code",
        lambda: same(copy(config__json=json.dumps(config | {"auto_map": bad_map}), evil__py=evil)),
    )
    yield (
        "auto_map to the Hub",
        lambda: same(copy(config__json=json.dumps(config | {"auto_map": {"AutoConfig": "evil/evil--evil.Evil"}}))),
    )
    yield "auto_map a number", lambda: same(copy(config__json=json.dumps(config | {"auto_map": 5})))
    yield "code of its own", lambda: same(copy(modeling_qgsa__py=evil, configuration_qgsa__py=evil))
    for name, data in {
        "gone": None,
        "empty": b"",
        "cut in the header": weights[:100],
        "cut in the weights": weights[: len(weights) // 2],
        "one byte less": weights[:-1],
        "header of 2**60 bytes": b"\xff" * 7 + b"\x0f" + weights[8:],
        "noise": np.random.default_rng(0).bytes(5000),
        "a pickle": pickle.dumps(Evil(flag)),
    }.items():
        yield f"model.safetensors: {name}", refused(partial(lambda data: load(copy(model__safetensors=data)), data))

    def changed(change):
        folder = copy()
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def drop(start):
        def change(tensors):
            for name in [name for name in tensors if start in name]:
                del tensors[name]

        return change

    def reshape(tensors):
        name = next(name for name in tensors if "selector.relevance.weight" in name)
        tensors[name] = torch.zeros(1, 5)

    def spoil(tensors):
        name = next(name for name in tensors if "selector.relevance.weight" in name)
        tensors[name] = tensors[name] * float("nan")

    yield "weights of another shape", refused(lambda: load(changed(reshape)))
    yield "weights that are NaN", refused(lambda: load(changed(spoil)))

    def told(part):
        _, info = QGSASmolVLMForConditionalGeneration.from_pretrained(changed(drop(part)), output_loading_info=True)
        check(any(part in key for key in info["missing_keys"]), f"loading does not report that {part} is missing")

    yield "weights of a layer missing", partial(told, "text_model.layers.1")
    yield "weights of the selector missing", partial(told, "model.selector")
    for name, data in {
        "pickle that runs code": pickle.dumps(Evil(flag)),
        "state dict that runs code": torch_bytes({"model.x": Evil(flag)}),
        "legacy pickle": pickle.dumps({"model.x": Evil(flag)}, protocol=2),
    }.items():
        call = partial(lambda data: load(copy(model__safetensors=None, pytorch_model__bin=data)), data)
        yield f"pytorch_model.bin: {name}", refused(call)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../../../etc/passwd"}}
    yield (
        "index that leads out",
        refused(
            lambda: load(copy(**{"model__safetensors": None, "model.safetensors__index__json": json.dumps(index)}))
        ),
    )
    for file in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        if not (good / file).exists():
            continue
        whole = (good / file).read_bytes()
        for name, data in {
            "empty": b"",
            "cut": whole[: len(whole) // 2],
            "a list": b"[]",
            "binary": b"\xff\xfe",
        }.items():
            files = {file.replace(".", "__"): data}
            yield f"{file}: {name}", refused(partial(lambda files: load_all(copy(**files)), files))
    for name in ("no/such/folder", "", str(bench.folder / "nothing"), "../" * 30 + "etc", "a" * 5000, "\0", 5, None):
        load_it = QGSASmolVLMForConditionalGeneration.from_pretrained
        yield f"from_pretrained {name!r:.40}", refused(partial(load_it, name))
        yield f"from_dense {name!r:.40}", refused(partial(QGSASmolVLMForConditionalGeneration.from_dense, name))


def torch_bytes(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


# 10: drawings


def of_drawings(bench):
    draw = bench.processor.draw_selection
    image = picture(19, 64, 16)
    selection = bench.model.select(**bench.process(image))
    for index in (1, -1, 10**9, 0.5, "0", None, float("nan"), [0]):
        yield f"index {index!r}", refused(partial(draw, image, selection, index))
    for name, wrong in {
        "None": None,
        "number": 5,
        "list": [image],
        "bytes": b"x",
        "no such file": "no_such_file.png",
        "empty path": "",
        "empty array": np.zeros((0, 0, 3), np.uint8),
        "1-d array": np.zeros(5, np.uint8),
        "two channels": np.zeros((48, 64, 2), np.uint8),
        "NaN": np.full((16, 64, 3), np.nan),
        "objects": np.full((16, 64, 3), None, object),
        "upright instead of lying": picture(19, 16, 64),
        "square": picture(19, 64, 64),
    }.items():
        yield f"image: {name}", refused(partial(draw, wrong, selection))
    for name, wrong in {"None": None, "dict": {}, "text": "x", "list": [], "tensor": torch.zeros(3)}.items():
        yield f"selection: {name}", refused(partial(draw, image, wrong))
    for name in ("kept_tokens", "kept_tiles", "grids", "image_sample"):
        broken = type(selection)(**{key: value for key, value in selection.items() if key != name})
        yield f"selection without {name}", refused(partial(draw, image, broken))
    other = bench.model.select(**bench.process(picture(20, 64, 64)))
    yield "selection of another image", refused(partial(draw, image, other))
    for mode in ("1", "L", "LA", "P", "PA", "RGBA", "CMYK", "I", "F", "I;16"):
        converted = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)

        def drawn(converted=converted):
            result = draw(converted, selection)
            check(result.mode == "RGB" and result.size == image.size, f"{result.mode} {result.size}")

        yield f"mode {mode}", answered(drawn)


FAMILIES = {
    "truncated": lambda bench: of_files(bench, truncated_files()),
    "flipped": lambda bench: of_files(bench, flipped_files()),
    "false": lambda bench: of_files(bench, false_files()),
    "bombs": of_bombs,
    "modes": of_modes,
    "arrays": lambda bench: of_arrays(bench, odd_arrays()),
    "tensors of pixels": lambda bench: of_arrays(bench, odd_tensors()),
    "arrays, torchvision": of_torchvision,
    "counts": of_counts,
    "questions": of_questions,
    "texts": of_texts,
    "options": of_options,
    "addresses": of_addresses,
    "padding": of_padding,
    "labels": of_labels,
    "budgets": of_budgets,
    "configurations": of_configs,
    "folders": of_folders,
    "drawings": of_drawings,
    **{f"prompts, {each}": partial(of_prompts, selection=each) for each in SELECTIONS},
    **{f"tensors, {each}": partial(of_tensors, selection=each) for each in SELECTIONS},
}
EAGER_ONLY = {"arrays, torchvision", "configurations", "folders", "drawings", "prompts, dense", "tensors, dense"}
CASES = [(family, lazy) for family in FAMILIES for lazy in (False, True) if not lazy or family not in EAGER_ONLY]


def test_what_the_judge_calls_wrong(monkeypatch):
    """A crash, a hang, a wrong answer and an unclear message are wrong; a clear error or an answer is not."""
    monkeypatch.setitem(globals(), "SECONDS", 0.1)

    def hang():
        while True:
            pass

    assert judge(hang) == "takes more than 0.1 s"
    assert judge(partial(torch.zeros(1).view, 7)).startswith("RuntimeError")
    assert judge(partial(check, False, "17 tiles")) == "wrong: 17 tiles"
    assert judge(refused(dict)).startswith("wrong: not refused")
    assert judge(answered(partial(json.loads, "{"))).startswith("wrong: refused: JSONDecodeError")
    assert judge(partial(json.loads, None)) == ""
    assert judge(lambda: len(5)).startswith("the test itself")
    assert judge(partial(Image.open, "no_such_file.png")) == ""
    assert judge(dict) == ""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family, lazy", CASES, ids=[f"{family}{', lazy' * lazy}" for family, lazy in CASES])
def test_broken_inputs(bench, family, lazy):
    bench.lazy = lazy
    failures, number = [], -1
    for number, (name, call) in enumerate(FAMILIES[family](bench)):
        problem = judge(call)
        if problem and not any(re.search(stock, f"{family}: {name}: {problem}") for stock in STOCK):
            failures.append(f"{number} {name}: {problem}")
    assert not failures, f"{len(failures)} of {number + 1} in {family!r}:\n" + "\n".join(failures)
