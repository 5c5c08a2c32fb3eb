"""The page for browsers, in Chromium: answers, tiles and tokens are those of `qgsa_onnx`.

transformers.js and ONNX Runtime come from npm, once, into the user's cache.
`QGSA_SCREENSHOT=hub_cards/browser/screenshot.png pytest tests/hub_cards/test_browser.py` takes a new screenshot.
"""

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import threading
from contextlib import ExitStack
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import export
import numpy as np
import pytest
from browsing import chromium, watched_page
from PIL import Image

from modeling_qgsa import QGSASmolVLMForConditionalGeneration
from training.data.cards import Cards


pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[onnx]'")
pytest.importorskip("onnx", reason="onnx is not installed: pip install -e '.[onnx]'")
qgsa_onnx = pytest.importorskip("qgsa_onnx")

HUB_CARDS = Path(__file__).parents[2] / "hub_cards"
PAGE = HUB_CARDS / "browser"
CDN = "https://cdn.jsdelivr.net/npm/"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qgsa-smolvlm" / "npm"
PACKAGES = sorted(set(re.findall(rf"{CDN}((?:@\w+/)?[\w-]+@[\w.-]+)/", (PAGE / "index.html").read_text())))
NEEDED = re.compile(r"dist/(transformers\.web\.min\.js|ort\.webgpu\.bundle\.min\.mjs|.*\.asyncify\.(mjs|wasm))$")
QUESTIONS = 8
TIMEOUT = 60_000  # ms, of a page; beside other programs, loading takes many seconds
CALIBRATED = {
    "attention_weights": [[0.5, 0.1], [1.5, -0.2], [1.0, 0.4]],
    "attention_temperature": 0.2,
    "attention_coverage": 0.5,
    "attention_nowhere": 0.4,
}
ASK = """async ([model, samples, options]) => {
    const { QGSAModel } = await import("./model.js");
    const { readPixels } = await import("./inputs.js");
    const loaded = await QGSAModel.load(model);
    const answers = [];
    for (const [question, image] of samples) {
        const pixels = await readPixels(await (await fetch(image)).blob());
        answers.push(await loaded.generate(pixels, question, { maxNewTokens: 6, ...options }));
    }
    return answers;
}"""


def fetch_package(name: str) -> Path:
    """The folder of a package of npm with the files that the page needs. Skips the test if it cannot be had."""
    folder = CACHE / name
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as made:
            command = ["npm", "pack", "--silent", "--pack-destination", made, name]
            try:
                done = subprocess.run(command, cwd=made, capture_output=True, text=True, timeout=180)
            except subprocess.TimeoutExpired:
                pytest.skip(f"npm did not bring {name} in time")
            if done.returncode:
                pytest.skip(f"npm has no {name}: {done.stderr.strip()[-200:]}")
            with tarfile.open(next(Path(made).glob("*.tgz"))) as packed:
                members = [member for member in packed if NEEDED.search(member.name)]
                packed.extractall(made, members, filter="data")
            folder.parent.mkdir(exist_ok=True)
            (Path(made) / "package").rename(folder)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder to be served: the page with its libraries next to it, and exports of the tiny checkpoints."""
    for program in ("npm", "chromium"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not on the PATH")
    folder, calibrated = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("calibrated")
    for package in PACKAGES:
        shutil.copytree(fetch_package(package), folder / "npm" / package)
    for path in PAGE.glob("*.js"):
        shutil.copy(path, folder)
    index = (PAGE / "index.html").read_text().replace(CDN, "./npm/")
    (folder / "index.html").write_text(index)
    head = re.search(r"<link.*?</script>", index, re.S)[0]  # no icon, and the import map
    (folder / "modules.html").write_text(head)
    (folder / "favicon.ico").touch()  # Chromium sometimes asks for it all the same
    dense = HUB_CARDS / "tiny-dense"
    QGSASmolVLMForConditionalGeneration.from_dense(dense, **CALIBRATED).save_pretrained(calibrated)
    for name, source in {"selector": HUB_CARDS / "tiny-qgsa", "attention": dense, "calibrated": calibrated}.items():
        options = {"processor": str(dense)} if source == calibrated else {}
        export.export(export.ExportArguments(str(source), str(folder / name), "onnx", ["fp32"], **options))
    return folder


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(site):
    """Where `python -m http.server` would serve the folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser, address):
    """Opens an address of the site in a new page, which must log exactly `errors` errors."""
    with ExitStack() as pages:

        def go(place, prepare=lambda page: None, errors=0):
            page = pages.enter_context(watched_page(browser, address, 1120, 720, errors))
            page.set_default_timeout(TIMEOUT)
            prepare(page)
            page.goto(f"{address}/{place}")
            return page

        yield go


def assert_same_answers(open_page, site, name, samples, **options):
    """Samples are questions with images."""
    for number, (_, image) in enumerate(samples):
        image.save(site / f"{name}-{number}.png")
    asked = [[question, f"{name}-{number}.png"] for number, (question, _) in enumerate(samples)]
    found = open_page("modules.html").evaluate(ASK, [name, asked, options])
    runtime = qgsa_onnx.OnnxModel(site / name)
    for (question, image), answer in zip(samples, found):
        expected = runtime.generate(qgsa_onnx.chat_prompt(question), [image], max_new_tokens=6, **options)
        assert (answer["text"], answer["ids"]) == (expected.text, expected.ids)
        assert answer["tiles"] == expected.selection.tiles.tolist()
        assert answer["kept"] == expected.selection.kept.ravel().tolist()


@pytest.mark.parametrize("name", ["selector", "attention", "calibrated"])
def test_answers_tiles_and_tokens_are_those_of_qgsa_onnx(name, open_page, site):
    samples = [(sample["question"], sample["image"]) for sample in Cards("validation", QUESTIONS)]
    assert_same_answers(open_page, site, name, samples)


@pytest.mark.parametrize("name", ["selector", "attention", "calibrated"])
def test_images_of_other_shapes(name, open_page, site, make_image):
    sizes = [(256, 64), (64, 128), (300, 200), (64, 64), (37, 500)]
    samples = [("what shape is on the red card?", make_image(1, 256, 256).resize(size)) for size in sizes]
    assert_same_answers(open_page, site, name, [*samples, (":", make_image(2))])


def test_dense_answers_are_those_of_qgsa_onnx(open_page, site):
    samples = [(sample["question"], sample["image"]) for sample in Cards("validation", 2)]
    assert_same_answers(open_page, site, "attention", samples, selection="dense")


def test_a_selection_that_the_graphs_lack_is_refused(open_page, site, make_image):
    make_image(1).save(site / "refused.png")
    asked = ["attention", [["a red card?", "refused.png"]], {"selection": "blocks"}]
    with pytest.raises(Exception, match=r"selection \(blocks\) must be before_encoder or dense"):
        open_page("modules.html").evaluate(ASK, asked)


def test_images_are_resized_as_by_pillow(open_page, make_image):
    image = make_image(3, 256, 256).resize((50, 40))
    pixels, page = np.asarray(image).ravel().tolist(), open_page("modules.html")
    code = """async ([data, width, height, resample]) => {
        const { resize } = await import("./resize.js");
        return [...resize({ data, width: 50, height: 40 }, width, height, resample).data];
    }"""
    for resample in (Image.Resampling.LANCZOS, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
        for size in [(64, 64), (20, 90), (13, 7), (50, 31)]:
            found = page.evaluate(code, [pixels, *size, int(resample)])
            assert found == np.asarray(image.resize(size, resample)).ravel().tolist()


def test_the_snippet_of_the_page_runs(open_page, site):
    """The readme's, with a model and an image that are there."""
    code = (PAGE / "README.md").read_text().split("```html\n")[1].split("```")[0]
    code = code.replace("me/my-qgsa", "selector").replace("int8", "fp32").replace("image.png", "cards.png")
    shutil.copy(HUB_CARDS / "space" / "examples" / "cards_18.png", site / "cards.png")
    (site / "snippet.html").write_text((site / "modules.html").read_text() + code)
    said = []
    page = open_page("snippet.html", lambda page: page.on("console", lambda message: said.append(message.text)))
    page.wait_for_event("console", predicate=lambda message: message.text.startswith("moon ")) if not said else None
    assert said[0].startswith("moon ")


def rows_of(page):
    return [row.locator("td").all_inner_texts() for row in page.locator("tbody tr").all()]


def test_the_page_shows_answers_and_tiles(open_page, site):
    """Asked as a visitor would, with the model and its parameters in the address."""
    picture = HUB_CARDS / "space" / "examples" / "cards_18.png"
    page = open_page("?model=selector&question=what shape is on the red card?")
    page.get_by_text("Choose an image and ask.").wait_for()
    page.get_by_label("Image").set_input_files(picture)
    page.get_by_label("compare with every tile").check()
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("Done.").wait_for()
    runtime = qgsa_onnx.OnnxModel(site / "selector")
    dense, ours = rows_of(page)
    prompt = qgsa_onnx.chat_prompt("what shape is on the red card?")
    expected = runtime.generate(prompt, [Image.open(picture)]).selection
    tiles, kept = expected.tiles.sum() - 1, expected.kept.sum()
    assert ours[:5] == ["what shape is on the red card?", "QGSA", "moon", f"{tiles} of 16", f"{kept} of 272"]
    assert dense[1:5] == ["every tile", "moon", "16 of 16", "272 of 272"]
    assert 0 < float(ours[5]) and 0 < float(dense[5])
    shades = "([x, y]) => [...document.querySelector('canvas').getContext('2d').getImageData(x, y, 1, 1).data]"
    outlined = []
    for tile in range(16):
        corner = [160 * (tile % 4) + 2, 160 * (tile // 4) + 2]
        outlined.append(page.evaluate(shades, corner)[:3] == [0x25, 0x63, 0xEB])
    assert outlined == expected.tiles[:-1].tolist()
    if "QGSA_SCREENSHOT" in os.environ:
        page.mouse.move(0, 0)
        shot = Image.open(io.BytesIO(page.screenshot()))
        shot.quantize(256).save(os.environ["QGSA_SCREENSHOT"], optimize=True)

    page.get_by_label("compare with every tile").uncheck()
    page.get_by_label("Question").fill("what shape is on the pink card?")
    page.get_by_label("Question").press("Enter")
    page.locator("tbody tr").nth(2).wait_for()
    assert rows_of(page)[0][2] == "heart"


def test_the_page_refuses_bad_questions_in_one_line(open_page, tmp_path):
    page = open_page("?model=attention")
    page.get_by_text("Choose an image and ask.").wait_for()
    ask, message = page.get_by_role("button", name="Ask"), page.get_by_role("status")

    def refuses(text):
        ask.click()
        message.filter(has_text=text).wait_for()

    refuses("image is missing: choose one")
    (tmp_path / "text.png").write_text("not an image")
    page.get_by_label("Image").set_input_files(tmp_path / "text.png")
    message.filter(has_text="cannot be read as an image").wait_for()
    Image.new("RGB", (900, 3)).save(tmp_path / "thin.png")
    page.get_by_label("Image").set_input_files(tmp_path / "thin.png")
    refuses("question is missing: write one")
    page.get_by_label("Question").fill("a red <image>?")
    refuses("question must not contain <image>")
    page.get_by_label("Question").fill("a red card?")
    refuses("image (900 x 3 px): each side must have at least 4 px, and the longer one at most 200 times the shorter")


def copied(site, name, **fields):
    """A copy of an export with another configuration."""
    folder = shutil.copytree(site / "attention", site / name, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.mark.parametrize(
    "fields, query, message",
    [
        (
            {},
            "model=changed&variant=q4",
            "has no onnx/vision_encoder_q4.onnx (404): export it with --format onnx, or choose another",
        ),
        ({}, "model=nothing", "/nothing/ has no config.json (404): export it"),
        ({}, "model=changed&variant=int4", "variant (int4) must be fp32, fp16, int8, q4"),
        ({"model_type": "qwen2_vl"}, "", "model_type (qwen2_vl) must be qgsa_smolvlm: export a checkpoint"),
        ({"pointer": None}, "", "pointer (null) must be attention or selector"),
        ({"positions": "compact"}, "", "positions (compact) must be original"),
        ({"selection": "blocks"}, "", "selection (blocks) must be before_encoder or dense"),
        ({"positions_per_image": 40}, "", "positions_per_image (40) must be null: change it, or choose another"),
    ],
)
def test_bad_models_are_refused_in_one_line(fields, query, message, open_page, site):
    copied(site, "changed", **fields)
    page = open_page(f"?{query or 'model=changed'}", errors=message.count("404"))
    page.get_by_role("status").filter(has_text=message).wait_for()
    assert page.get_by_role("button", name="Ask").is_disabled()


def test_a_browser_without_webassembly_is_told(open_page):
    page = open_page("?model=attention", lambda page: page.add_init_script("delete globalThis.WebAssembly"))
    page.get_by_role("status").filter(has_text="This browser has no WebAssembly: use another one.").wait_for()


def test_missing_libraries_are_told(open_page):
    page = open_page(
        "?model=attention", lambda page: page.route("**/npm/**/transformers*", lambda route: route.abort()), errors=1
    )
    page.get_by_role("status").filter(has_text="transformers.js could not be loaded").wait_for()


def test_a_hub_id_names_the_files_of_the_hub(browser, address, site):
    """And they stay in the cache of transformers.js."""
    hub = "https://huggingface.co/me/my-qgsa/resolve/main/"
    fetched = []

    def serve(route):
        fetched.append(route.request.url.removeprefix(hub))
        route.fulfill(path=site / "selector" / fetched[-1], headers={"access-control-allow-origin": "*"})

    with watched_page(browser, ("http://127.0.0.1", hub), 1120, 720) as page:
        page.set_default_timeout(TIMEOUT)
        page.route(f"{hub}**", serve)
        for _ in range(2):
            page.goto(f"{address}/?model=me/my-qgsa")
            page.get_by_text("Choose an image and ask.").wait_for()
    assert len(fetched) == len(set(fetched)) == 10 and "onnx/selector_match.onnx" in fetched
