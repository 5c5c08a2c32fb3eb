"""The plugin for vLLM: rows as announced, and the answers of `generate`."""

import base64
import io
import json
import os
import subprocess
from pathlib import Path

import httpx
import pytest
import torch
from export import ExportArguments, export
from PIL import Image
from qgsa_vllm.selecting import (
    AskedImage,
    budget_of,
    check_servable,
    count_positions,
    embed_images,
    image_ids,
    left_padded,
    prompt_about,
)
from serve_processes import started, vllm
from tqdm.auto import tqdm

from modeling_qgsa import QGSAConfig, QGSAProcessor, QGSASmolVLMForConditionalGeneration
from modeling_qgsa.vision_qgsa import VisualCache
from training.data.cards import Cards


ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "hub_cards" / "tiny-qgsa"
PUBLISHED = ROOT.parent / "shared" / "checkpoints" / "smolvlm-256m-instruct"
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
NEW, COUNT = 8, 40
ROUNDING = 1e-3  # of a logit
HALF = "\ufffd"  # half a character at the end of an answer, which vLLM holds back


# What the plugin does with our model, without vLLM


def asked(processor, config, question, images, limits=(50, 0, 4)):
    """The images of one request as the plugin passes them on, and the prompt as vLLM makes it."""
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = processor.tokenizer(text)["input_ids"]
    options = dict(zip(("positions_per_image", "min_tiles", "max_tiles"), limits))
    found, prompt, rest = [], [], iter(images)
    for each in ids:
        if each != config.image_token_id:
            prompt.append(each)
            continue
        image = next(rest)
        _, rows, columns = processor.image_processor.get_number_of_image_patches(image.height, image.width, {})
        block = image_ids(processor, rows, columns)
        prompt += [each] * count_positions(config, budget_of(config, options, block), block)
        inputs = processor.image_processor([image], return_tensors="pt")
        about = torch.tensor(prompt_about(ids, block, config.image_token_id))
        found.append(AskedImage(about, inputs["pixel_values"][0], inputs["pixel_attention_mask"][0], limits))
    return found, prompt


@pytest.fixture(scope="module")
def requests(processor, model, samples, make_image):
    rows = [*samples, ("where is it?", [make_image(1, 256, 64), make_image(2, 64, 128)])]
    limits = [(50, 0, 4), (50, 0, 4), (30, 1, 2), (60, 2, 3)]
    return [asked(processor, model.config, *row, limit) for row, limit in zip(rows, limits)]


def test_as_many_rows_as_announced(model, requests):
    images = [image for found, _ in requests for image in found]
    rows = embed_images(model.model, images)
    announced = [prompt.count(model.config.image_token_id) for _, prompt in requests]
    assert [*map(len, rows[:3]), len(rows[3]) + len(rows[4])] == announced
    for image, row in zip(images, rows):  # in a batch and alone
        assert torch.allclose(embed_images(model.model, [image])[0], row, atol=1e-5)


def test_a_cache_changes_nothing_but_the_work(model, requests, tiles_encoded):
    images, cache = requests[0][0], VisualCache()
    expected = embed_images(model.model, images)[0]
    with tiles_encoded(model) as counts:
        for _ in range(2):
            assert torch.allclose(embed_images(model.model, images, cache)[0], expected, atol=1e-5)
    assert sum(counts) == len(cache)


def test_an_engine_answers_as_generate_does(model, processor, prepare, samples, requests):
    """Words and rows in one prompt, numbered from 0 on, through the text model alone."""
    for sample, (images, prompt), limits in zip(samples, requests, [(50, 0, 4), (50, 0, 4), (30, 1, 2)]):
        ids = torch.tensor([prompt])
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == model.config.image_token_id] = torch.cat(embed_images(model.model, images))
        found = model.generate(inputs_embeds=embeds, max_new_tokens=NEW)[0, -NEW:]
        options = {"positions_per_image": limits[0], "min_tiles": limits[1], "max_tiles": limits[2]}
        expected = model.generate(**prepare(sample), **options, positions="compact", max_new_tokens=NEW)
        assert torch.equal(found, expected[0, -NEW:])


def test_the_prompt_about_one_image():
    assert prompt_about([1, 9, 5, 9, 6], [7, 7], 9) == [1, 7, 7, 5, 6]
    assert prompt_about([], [7], 9) == [7]
    assert left_padded([torch.tensor([1, 2, 3]), torch.tensor([4])], 0).tolist() == [[1, 2, 3], [0, 0, 4]]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"selection": "dense"}, r'selection \("dense"\) selects nothing: export a plain model'),
        ({"vision_layers": ["full", "text"]}, r"vision_layers \(full, text\): vLLM's layers see everything"),
        ({"vision_policy": True, "vision_schedules": ["FT", "FF"]}, r"vision_policy \(True\)"),
    ],
)
def test_what_vllm_would_serve_otherwise_is_refused(fields, message, model):
    with pytest.raises(ValueError, match=message):
        check_servable(QGSAConfig.from_dict(model.config.to_dict() | fields))


@pytest.mark.parametrize("grid, stay, count", [((4, 4), 0, 64), ((4, 4), 1, 88), ((0, 0), 0, 19), ((1, 2), 0, 57)])
def test_the_default_count_has_room_for_all_limits(grid, stay, count, model, processor):
    """48 visual tokens, and the markers of 4 tiles with the line ends that they may own, or of all tiles."""
    config = QGSAConfig.from_dict(model.config.to_dict() | {"keep_tile_markers": bool(stay)})
    block = image_ids(processor, *grid)
    budget = budget_of(config, {}, block)
    assert budget.positions_per_image == count_positions(config, budget, block) == count
    assert budget_of(config, {"positions_per_image": 24}, block).positions_per_image == 24


@pytest.mark.parametrize("name", ["max_visual_tokens", "selection", "max_image_tokens", "vision_budget"])
def test_a_budget_that_vllm_cannot_have_is_refused(name, model, processor):
    """It would be ignored otherwise."""
    with pytest.raises(ValueError, match=rf"{name} \(5\): in vLLM, a request may set positions_per_image, min_tiles"):
        budget_of(model.config, {name: 5}, image_ids(processor, 4, 4))


# vLLM itself


def part(image: Image.Image) -> dict:
    data = io.BytesIO()
    image.save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def conversation(question: str, *images: Image.Image) -> list[dict]:
    return [{"role": "user", "content": [*map(part, images), {"type": "text", "text": question}]}]


def with_fields(folder: Path, **fields) -> Path:
    """Sets fields of its configuration."""
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def loaded(folder: Path):
    """A checkpoint, and our model and processor for it: in float32 and with the pixels of PIL, as in vLLM."""
    model = QGSASmolVLMForConditionalGeneration.from_pretrained(folder, dtype="float32")
    return folder, model, QGSAProcessor.from_pretrained(folder, backend="pil")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A copy of the trained checkpoint with an exact count."""
    folder = tmp_path_factory.mktemp("served") / "tiny-qgsa"
    folder.mkdir()
    for path in CHECKPOINT.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return loaded(with_fields(folder, positions_per_image=COUNT, positions="compact"))


def generated(served, question, images, **options) -> str:
    return generated_with_gap(served, question, images, **options)[0]


def generated_with_gap(served, question, images, **options) -> tuple[str, float]:
    """The answer, and the smallest distance between the logits of the two best tokens of a step."""
    _, model, processor = served
    content = [*[{"type": "image"}] * len(images), {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=images or None, return_tensors="pt")
    options |= {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(**inputs, **options)
    best = torch.stack(found.logits).topk(2).values
    answer = processor.decode(found.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer, (best[..., 0] - best[..., 1]).min().item()


def ask_vllm(folder: Path, calls: list[dict]) -> list[dict]:
    """Results of `vllm_answers.py`."""
    if not VLLM.exists():
        pytest.skip("vLLM is not set up: make vllm")
    command = [VLLM, Path(__file__).with_name("vllm_answers.py"), folder]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, input=json.dumps(calls), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def results(served):
    """Results of vLLM, by the name of the call."""
    cards = [Cards("validation", 16)[number] for number in range(16)]
    image, other = cards[0]["image"], cards[1]["image"]
    calls = {
        "batch": {"conversations": [conversation(each["question"], each["image"]) for each in cards]},
        "alone": {"conversations": [conversation(cards[0]["question"], image)]},
        "question": {"conversations": [conversation("how many cards are there?", image)]},
        "text": {"conversations": [conversation("how many cards are there?")]},
        "two images": {"conversations": [conversation("how many cards are there?", image, other)]},
        "limits": {
            "conversations": [conversation("what shape is on the red card?", image)],
            "mm_processor_kwargs": {"positions_per_image": 24, "max_tiles": 1},
        },
        "no room": {
            "conversations": [conversation("where is it?", image)],
            "mm_processor_kwargs": {"positions_per_image": 3},
        },
        "no number": {
            "conversations": [conversation("where is it?", image)],
            "mm_processor_kwargs": {"max_tiles": "two"},
        },
    }
    return dict(zip(calls, ask_vllm(served[0], list(calls.values())))), cards


def test_vllm_answers_a_batch_as_generate_does(served, results):
    found, cards = results
    assert found["batch"]["answers"] == [generated(served, each["question"], [each["image"]]) for each in cards]


def test_vllm_answers_one_request_as_in_a_batch(served, results):
    found, cards = results
    assert found["alone"]["answers"] == found["batch"]["answers"][:1]


def test_another_question_about_an_image_selects_anew(served, results):
    found, cards = results
    assert found["question"]["answers"] == [generated(served, "how many cards are there?", [cards[0]["image"]])]
    assert found["question"]["tiles"], "the image is another item for another question"


def test_vllm_answers_text_alone(served, results):
    found, _ = results
    assert found["text"]["answers"] == [generated(served, "how many cards are there?", [])]
    assert found["text"]["tiles"] == []


def test_two_images_take_twice_the_positions(served, results):
    found, cards = results
    question, images = "how many cards are there?", [each["image"] for each in cards[:2]]
    assert found["two images"]["answers"] == [generated(served, question, images)]
    text, one, two = (found[name]["positions"][0] for name in ("text", "question", "two images"))
    assert two - one == COUNT and one >= text + COUNT - 1


def test_limits_of_a_request(served, results):
    found, cards = results
    options = {"positions_per_image": 24, "max_tiles": 1}
    assert found["limits"]["answers"] == [
        generated(served, "what shape is on the red card?", [cards[0]["image"]], **options)
    ]
    assert sum(found["limits"]["tiles"]) <= 2


def test_bad_limits_are_named_in_one_line(results):
    found, _ = results
    assert found["no room"]["error"].startswith("positions_per_image (3) leaves no room for visual tokens")
    assert found["no number"]["error"] == "max_tiles ('two') must be an integer of at most 2147483647"


@pytest.fixture(scope="module", params=["trained", "architecture of 256M"])
def any_served(request, tmp_path_factory):
    if request.param == "trained":
        return request.getfixturevalue("served")
    if not PUBLISHED.exists():
        pytest.skip(f"no {PUBLISHED.name}: its files are not part of the repository")
    folder = tmp_path_factory.mktemp("served") / "256m"
    export(ExportArguments(str(PUBLISHED), str(folder), random_weights=True))
    return loaded(with_fields(folder, positions_per_image=190, positions="compact", max_tiles=2))


@pytest.mark.slow
def test_vllm_answers_256_questions_as_generate_does(any_served):
    """Sixteen at a time. Answers may differ where two tokens are as good as each other, but for rounding."""
    cards = [Cards("validation", 256)[number] for number in range(256)]
    batches = [
        {"conversations": [conversation(card["question"], card["image"]) for card in cards[start : start + 16]]}
        for start in range(0, 256, 16)
    ]
    found = [answer for result in ask_vllm(any_served[0], batches) for answer in result["answers"]]
    differing = []
    for card, answer in tqdm(list(zip(cards, found, strict=True)), desc="generate"):
        expected, gap = generated_with_gap(any_served, card["question"], [card["image"]])
        if answer.rstrip(HALF) != expected.rstrip(HALF):
            differing.append((card["question"], answer, expected, gap))
    print(len(differing), "of 256 differ:", differing)
    assert all(gap < ROUNDING for *_, gap in differing), differing


# Its server


@pytest.fixture(scope="module")
def server(served, tmp_path_factory):
    if not VLLM.exists():
        pytest.skip("vLLM is not set up: make vllm")
    options = ("--dtype=float32", "--max-model-len=1024", "--api-key=secret", "--trust-request-mm-kwargs")
    command = vllm(str(VLLM), served[0], *options, "--served-model-name=tiny", '--limit-mm-per-prompt={"image": 2}')
    with started(command, tmp_path_factory.mktemp("server") / "log") as server:
        yield server


def post(server, key="secret", images=None, **fields):
    images = [Cards("validation", 16)[0]["image"]] if images is None else images
    body = {"messages": conversation("where is it?", *images), "max_tokens": 2, "temperature": 0, **fields}
    url, headers = f"{server.url}/v1/chat/completions", {"authorization": f"Bearer {key}"}
    return httpx.post(url, json=body, headers=headers, timeout=300, trust_env=False)


BAD = {
    "an unknown model": ({"model": "other"}, 404, "The model `other` does not exist"),
    "no number": ({"max_tiles": "two"}, 400, "max_tiles ('two') must be an integer of at most"),
    "a negative number": ({"max_tiles": -1}, 400, "min_tiles (0) must not exceed max_tiles (-1)"),
    "a number that is too large": ({"max_tiles": 2**40}, 400, f"max_tiles ({2**40}) must be an integer of at most"),
    "limits the wrong way round": (
        {"min_tiles": 5, "max_tiles": 1},
        400,
        "min_tiles (5) must not exceed max_tiles (1)",
    ),
    "no room": ({"positions_per_image": 3}, 400, "positions_per_image (3) leaves no room for visual tokens"),
    "a count beyond its own": (
        {"positions_per_image": COUNT + 1},
        400,
        f"positions_per_image ({COUNT + 1}): this checkpoint is configured for at most {COUNT}",
    ),
    "a budget of other servers": ({"max_visual_tokens": 5}, 400, "max_visual_tokens (5): in vLLM, a request may set"),
    "an image that is too large": ({"images": [(12000, 12000)]}, 400, "image (12000 x 12000 px)"),
    "an image that is too narrow": ({"images": [(2000, 1)]}, 400, "image (2000 x 1 px)"),
    "three images": ({"images": [(64, 64)] * 3}, 400, "At most 2 image(s) may be provided"),
    "a long answer": ({"max_tokens": 100_000}, 400, "max_tokens=100000 cannot be greater than max_model_len=1024"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_an_error_in_the_format_of_openai(name, server):
    given, status, message = BAD[name]
    given = dict(given)
    fields = {field: given.pop(field) for field in ("model", "max_tokens") if field in given}
    images = [Image.new("1", size) for size in given.pop("images")] if "images" in given else None
    response = post(server, images=images, mm_processor_kwargs=given or None, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["message"][: len(message)]) == (status, message)
    assert error["type"] and {"param", "code"} <= set(error)


def test_a_wrong_key_is_refused_and_a_right_one_answered_after_all_that(server):
    """The body of the former is vLLM's own."""
    refused = post(server, key="wrong")
    assert (refused.status_code, refused.json()) == (401, {"error": "Unauthorized"})
    assert post(server).json()["choices"][0]["message"]["content"]
