"""The Space: the results of `ask`, and the page in a browser.

`QGSA_SCREENSHOT=hub_cards/space/screenshot.png pytest tests/hub_cards/test_space.py` takes a new screenshot.
"""

import importlib.util
import io
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from browsing import WAIT, chromium, watched_page
from PIL import Image, ImageChops


pytest.importorskip("gradio")

SPACE = Path(__file__).parents[2] / "hub_cards" / "space"
QUESTIONS = ("what shape is on the red card?", "what shape is on the purple card?")  # in different tiles
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy for loopback


@pytest.fixture(scope="module")
def space():
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    module.MEASURED_SECONDS = 0  # one answer each
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def loaded(space):
    return space.load(str(space.TINY))


@pytest.fixture(scope="module")
def picture():
    return Image.open(SPACE / "examples" / "cards_18.png").convert("RGB")


def test_ask_counts_and_answers_as_the_model_does(space, loaded, picture):
    model, processor = loaded
    answer = space.ask(model, processor, picture, QUESTIONS[0], 60)

    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    selection = model.select(**inputs, max_image_tokens=60)
    assert answer.tokens == (int(selection.visual_tokens), 17 * 16)
    assert answer.tiles == (int(selection.tiles), 16)
    for text, options in zip(answer.texts, ({"max_image_tokens": 60}, {"selection": "dense"})):
        ids = model.generate(**inputs, **options, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
        assert text == processor.decode(ids, skip_special_tokens=True).strip() == "moon"
    assert all(0 < milliseconds < 10_000 for milliseconds in answer.milliseconds)


def test_ask_keeps_to_the_budget(space, loaded, picture):
    answers = [space.ask(*loaded, picture, QUESTIONS[0], number) for number in (8, 60, 272)]
    assert answers[0].tiles[0] <= 1 and answers[0].tokens[0] == 8 and answers[1].tokens[0] <= 60
    assert answers[0].tokens < answers[1].tokens < answers[2].tokens


def test_pictures_show_tiles_and_global_view_apart(space, loaded, picture):
    model, processor = loaded
    first, second = (space.ask(*loaded, picture, question, 60) for question in QUESTIONS)
    assert first.tiles_picture.size == first.global_picture.size == (640, 640)
    assert ImageChops.difference(first.tiles_picture, second.tiles_picture).getbbox()
    assert ImageChops.difference(first.global_picture, second.global_picture).getbbox()

    _, output, _ = space.generate(model, processor, picture, QUESTIONS[0], True, max_tiles=0)
    tiles, glance = space.draw(processor, picture, output.selection)
    red, _, blue = tiles.split()
    assert not ImageChops.difference(red, blue).getbbox()  # grey all over, and white lines
    red, _, blue = glance.split()
    assert ImageChops.difference(red, blue).getbbox()


@pytest.mark.parametrize("mode", ["P", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(4, 4), (30, 50), (1600, 10), (900, 1200)])
def test_any_image_is_answered_and_drawn(space, loaded, mode, size):
    answer = space.ask(*loaded, Image.new(mode, size), "which colour is the card with the star?", 272)
    assert answer.tiles[0] == answer.tiles[1]  # everything is drawn
    assert max(answer.tiles_picture.size) == 640 and min(answer.tiles_picture.size) >= 64


@pytest.mark.parametrize(
    "image, question, budget, message",
    [
        (None, "is there a red card?", 60, "image is missing"),
        (Image.new("RGB", (64, 64)), "  ", 60, "question is missing"),
        (Image.new("RGB", (3, 64)), "is there a red card?", 60, "3 x 64 px"),
        (Image.new("RGB", (64, 64)), "is there a red <image>?", 60, "2 images"),
        (Image.new("RGB", (64, 64)), "is there a red card?", 0, "max_image_tokens .0. must be an integer of 1 to"),
    ],
)
def test_invalid_questions_raise_value_error(space, loaded, image, question, budget, message):
    with pytest.raises(ValueError, match=message):
        space.ask(*loaded, image, question, budget)


def test_a_saved_checkpoint_answers_alike(space, loaded, picture, tmp_path):
    model, processor = loaded
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = space.load(str(tmp_path))
    first, second = (space.ask(*each, picture, QUESTIONS[0], 60) for each in (loaded, again))
    assert (first.texts, first.tokens) == (second.texts, second.tokens)
    assert first.tiles_picture == second.tiles_picture


def test_an_unknown_model_is_reported_in_one_line(tmp_path):
    command = [sys.executable, SPACE / "app.py", "--model", tmp_path / "nope"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.fullmatch(r"error: .*nope.*", done.stderr.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of the app, started the way a Space does, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("space") / "log"
    names = {"GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "QGSA_MODEL"} | names
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, SPACE / "app.py"], stdout=output, stderr=output, env=environment)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while not answers(address):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield address
        assert process.poll() is None and "encoder tuned: " in log.read_text(), log.read_text()
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def answers(address: str) -> bool:
    try:
        return LOCAL.open(address).status == 200
    except OSError:
        return False


@pytest.fixture
def page(server):
    with chromium() as browser, watched_page(browser, server, 1280, 1065) as page:
        page.goto(server)
        yield page


def wait_for(look, condition):
    """Poll until the condition holds, and return the last value."""
    deadline = time.monotonic() + WAIT / 1000
    while not condition(seen := look()):
        assert time.monotonic() < deadline, f"still {str(seen)[:100]!r}"
        time.sleep(0.05)
    return seen


def test_page_answers_two_questions_side_by_side(page, server):
    def answer(number):
        return page.locator(f"#answer-{number} textarea").input_value()

    def overlay(number, picture="tiles"):
        image = page.locator(f"#{picture}-{number} img")
        return LOCAL.open(image.get_attribute("src")).read() if image.count() else b""

    def numbers(number):
        cells = page.locator(f"#numbers-{number} td").all_inner_texts()
        return [int(re.match(r"\d+", cell)[0]) for cell in cells if cell[:1].isdigit()]

    def ask(number, question):
        page.get_by_label(f"Question {number}").fill(question)

    page.locator("table img").nth(1).click()
    wait_for(lambda: page.get_by_label("Question 2").input_value(), lambda text: "how many" in text)
    page.locator("table img").nth(0).click()
    wait_for(lambda: page.get_by_label("Question 2").input_value(), lambda text: "purple" in text)
    ask(1, QUESTIONS[0])
    ask(2, QUESTIONS[1])
    page.get_by_role("button", name="Ask both questions").click()
    assert wait_for(lambda: answer(1), bool) == "moon"
    assert wait_for(lambda: answer(2), bool) == "cross"
    assert page.locator("#dense-answer-2 textarea").input_value() == "cross"
    first, second = (wait_for(lambda n=n: overlay(n), bool) for n in (1, 2))
    assert first != second
    assert overlay(1, "global-view") != overlay(2, "global-view")
    tokens, dense_tokens, tiles, dense_tiles, *milliseconds = wait_for(lambda: numbers(1), bool)
    assert (tokens < dense_tokens, tiles, dense_tokens, dense_tiles) == (True, 1, 272, 16)
    assert len(milliseconds) == 2 and all(milliseconds)
    if "QGSA_SCREENSHOT" in os.environ:
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)  # until all transitions are done
        page.screenshot(path=os.environ["QGSA_SCREENSHOT"])

    with page.expect_download() as download:
        page.locator("#tiles-1").get_by_label("Download").click()
    content = Path(download.value.path()).read_bytes()
    assert content == first and Image.open(io.BytesIO(content)).format == "PNG"

    ask(1, "what shape is on the pink card?")
    page.get_by_label("Question 1").press("Enter")
    wait_for(lambda: answer(1), lambda text: text == "heart")
    assert wait_for(lambda: overlay(1), lambda seen: seen != first)
    assert overlay(2) == second

    page.locator("input[type=range]").click(position={"x": 200, "y": 5})
    wait_for(lambda: numbers(1), lambda seen: seen[0] > tokens)
    wait_for(lambda: numbers(2), lambda seen: seen[0] > tokens)


def test_page_survives_invalid_questions(page, tmp_path):
    question, remove = page.get_by_label("Question 1"), page.get_by_label("Remove Image")

    def ask_in_vain(message):
        question.press("Enter")
        page.get_by_test_id("toast-body").filter(has_text=message).wait_for()
        page.get_by_test_id("toast-close").click()
        page.get_by_test_id("toast-body").wait_for(state="detached")

    question.fill(" ")
    ask_in_vain("question is missing")
    question.fill("a red <image>")
    ask_in_vain("2 images")
    remove.click()
    ask_in_vain("image is missing")
    Image.new("RGB", (3, 3)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("not an image")
    for name, message in (("small.png", "3 x 3 px"), ("text.png", "cannot identify image file")):
        page.locator("input[type=file]").set_input_files(tmp_path / name)
        remove.wait_for()
        ask_in_vain(message)
        remove.click()

    page.locator("table img").nth(1).click()
    wait_for(question.input_value, lambda text: "circle" in text)
    page.get_by_role("button", name="Ask both questions").click()
    wait_for(page.locator("#answer-1 textarea").input_value, lambda text: text == "orange")
