"""The Space of QGSA-SmolVLM: two questions about one image, and the parts kept for each.

    python hub_cards/space/app.py                          # the tiny checkpoint of the repository
    python hub_cards/space/app.py --model FOLDER_OR_HUB_ID

A Space runs `python app.py` and takes the model from its variable QGSA_MODEL. The page is served on 127.0.0.1:7860, or
on Gradio's GRADIO_SERVER_NAME and GRADIO_SERVER_PORT.
"""

import argparse
import html
import os
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import gradio as gr
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "tiny-qgsa"
MAX_NEW_TOKENS = 32
MEASURED_SECONDS = 0.5  # a single answer of a tiny model is too short to time
LONG_SIDE = 640  # px of a picture, whatever the size of the image
SHORT_SIDE = 64  # px at least, to keep the cells of long, narrow images apart
THEME = gr.themes.Default(spacing_size="sm", font=["system-ui", "sans-serif"], font_mono=["monospace"])
CSS = """
.picture img { padding-top: 2.2rem }  /* keeps label and buttons off the tiles */
.numbers table { width: 100%; margin: 0; font-size: 0.85rem; white-space: nowrap }
.numbers :is(th, td) { border: 1px solid var(--border-color-primary) !important; padding: 0.3rem 0.6rem !important }
"""

EXAMPLES = [  # from the test split of cards; see README.md
    ["cards_18.png", "what shape is on the red card?", "what shape is on the purple card?"],
    ["cards_0.png", "which colour is the card with the circle?", "how many cards are there?"],
]
INTRO = """
# One image, two questions, two selections

The model first glances at a thumbnail, the **global view**. The question then decides which **tiles** are encoded
(blue) and which **visual tokens** are kept (orange; the global view is shown separately). **Dense** encodes and keeps
everything, like stock SmolVLM. The selection does not explain the answer.
"""


@dataclass(frozen=True)
class Answer:
    """Both answers to a question, and the selection. Pairs are (QGSA, dense).

    Args:
        texts: the answers.
        tokens: number of visual tokens kept.
        tiles: number of high-resolution tiles encoded, without the global view.
        milliseconds: time from image and question to the answer, the median of the answers within half a second.
        tiles_picture: the image, in colour where tokens of tiles are kept; encoded tiles are outlined in blue.
        global_picture: the global view at the model's resolution, in colour where its tokens are kept.
    """

    texts: tuple[str, str]
    tokens: tuple[int, int]
    tiles: tuple[int, int]
    milliseconds: tuple[float, float]
    tiles_picture: Image.Image
    global_picture: Image.Image


def load(name: str):
    """Load `(model, processor)` from a Hub id or folder, on the GPU if there is one."""
    # Exported checkpoints carry their code; those of the repository need the package, which registers its classes.
    if Path(name).is_dir() and not Path(name, "modeling_qgsa.py").exists():
        import modeling_qgsa  # noqa: F401
    model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True).eval()
    # The backend that is there without torchvision, too.
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True, backend="pil")
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor


def generate(model, processor, image, question: str, lazy_tiles: bool, **options):
    """Answer greedily. Returns the text, the output of `model.generate` and the time in milliseconds."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    start = time.perf_counter()
    inputs = processor(images=[image], text=prompt, lazy_tiles=lazy_tiles, return_tensors="pt").to(model.device)
    output = model.generate(
        **inputs, **options, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, return_dict_in_generate=True
    )
    text = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip(), output, 1000 * (time.perf_counter() - start)


def draw(processor, image: Image.Image, selection) -> tuple[Image.Image, Image.Image]:
    """Draw the kept parts of the tiles and, separately, of the global view."""
    per_tile, side = processor.image_seq_len, processor.image_processor.max_image_size["longest_edge"]
    large = image.resize([max(SHORT_SIDE, round(edge * LONG_SIDE / max(image.size))) for edge in image.size])
    coarse = image.resize((side, side)).resize(large.size)
    tile_tokens, global_tokens = selection.kept_tokens.clone(), selection.kept_tokens[:, -per_tile:]  # the last
    tile_tokens[:, -per_tile:] = False
    tiles = replace(selection, kept_tokens=tile_tokens)
    # The global view alone has the layout of a single-tile image: a grid of 0 x 0.
    global_view = replace(
        selection,
        kept_tokens=global_tokens,
        kept_tiles=selection.kept_tiles[:, -1:],
        grids=torch.zeros_like(selection.grids),
    )
    return processor.draw_selection(large, tiles), processor.draw_selection(coarse, global_view)


def ask(model, processor, image: Image.Image | None, question: str, max_image_tokens: int) -> Answer:
    """Answer a question with QGSA and with dense.

    Args:
        model, processor: as returned by [`load`].
        image: PIL image of any mode.
        max_image_tokens: maximum number of visual tokens, which limits the tiles too; the question decides how much of
            this budget is used.

    Raises ValueError if image or question is missing, if the image cannot be cut into tiles, or if the budget is out
    of range.
    """
    if image is None:
        raise ValueError("image is missing: upload one or pick an example")
    if not question.strip():
        raise ValueError("question is missing: the selection depends on it")
    answer = partial(generate, model, processor, image, question)
    start, times = time.perf_counter(), []
    while not times or time.perf_counter() - start < MEASURED_SECONDS:
        # Alternating, so that both run under the same load.
        text, output, milliseconds = answer(lazy_tiles=True, max_image_tokens=int(max_image_tokens))
        dense_text, _, dense_milliseconds = answer(lazy_tiles=False, selection="dense")
        times.append((milliseconds, dense_milliseconds))
    selection = output.selection
    return Answer(
        (text, dense_text),
        (int(selection.visual_tokens[0]), selection.kept_tokens.shape[1]),
        (int(selection.tiles[0]), selection.kept_tiles.shape[1] - 1),
        tuple(map(median, zip(*times))),
        *draw(processor, image, selection),
    )


def format_numbers(answer: Answer) -> str:
    """Cost of both answers as a Markdown table."""
    (k, n), (m, tiles), (qgsa, dense) = answer.tokens, answer.tiles, answer.milliseconds
    return f"""
| | QGSA | dense |
|---|---|---|
| tokens | {k} of {n} | {n} |
| tiles | {m} of {tiles} | {tiles} |
| ms | {qgsa:.0f} | {dense:.0f} |
"""


def build(model, processor) -> gr.Blocks:
    """Build the page."""

    def show(image, question, max_image_tokens):
        try:
            answer = ask(model, processor, image, question, max_image_tokens)
        except ValueError as error:
            message = html.escape(str(error))  # may contain tokens such as <image>
            raise gr.Error(message, print_exception=False) from error
        return *answer.texts, answer.tiles_picture, answer.global_picture, format_numbers(answer)

    config, image_processor = model.config, processor.image_processor
    all_tiles = (image_processor.size["longest_edge"] // image_processor.max_image_size["longest_edge"]) ** 2
    all_tokens = (all_tiles + 1) * processor.image_seq_len  # plus the global view
    examples = [[str(HERE / "examples" / name), *asked] for name, *asked in EXAMPLES]
    questions = [gr.Textbox(examples[0][number], label=f"Question {number}", render=False) for number in (1, 2)]
    with gr.Blocks(title="QGSA-SmolVLM", analytics_enabled=False) as page:
        gr.Markdown(INTRO)
        with gr.Row():
            with gr.Column(scale=3):
                shape = {"label": "Image", "height": 300, "elem_classes": "picture"}
                image = gr.Image(examples[0][0], type="pil", image_mode=None, sources=["upload", "clipboard"], **shape)
            with gr.Column(scale=5):
                gr.Examples(examples, [image, *questions], label="Examples: an image and two questions")
            with gr.Column(scale=4):
                low, high, value = config.min_visual_tokens, all_tokens, config.max_visual_tokens
                max_tokens = gr.Slider(low, high, value, step=1, label="Maximum image tokens")
                button = gr.Button("Ask both questions", variant="primary")
        with gr.Row():
            for number, question in enumerate(questions, 1):
                with gr.Column():
                    question.render()
                    outputs = build_results(number)
                events = [button.click, question.submit, max_tokens.release]
                inputs = [image, question, max_tokens]
                # One question at a time, so that the times are comparable.
                gr.on(events, show, inputs, outputs, concurrency_id="model", show_progress_on=outputs[:1])
    return page.queue(default_concurrency_limit=1)


def build_results(number: int) -> list:
    """Output components of one question, in the order that `show` returns."""
    with gr.Row():
        text = gr.Textbox(label="Answer", elem_id=f"answer-{number}")
        dense_text = gr.Textbox(label="Dense answer", elem_id=f"dense-answer-{number}")
    with gr.Row(equal_height=False):
        picture = {"format": "png", "elem_classes": "picture", "buttons": ["download", "fullscreen"]}
        with gr.Column(scale=3):
            tiles = gr.Image(label="Kept for this question", elem_id=f"tiles-{number}", height=390, **picture)
        with gr.Column(scale=2, min_width=200):
            glance = gr.Image(label="Kept in the global view", elem_id=f"global-view-{number}", height=240, **picture)
            numbers = gr.Markdown(elem_id=f"numbers-{number}", elem_classes="numbers")
    return [text, dense_text, tiles, glance, numbers]


def main():
    """Load the model and serve the page."""
    parser = argparse.ArgumentParser(description="Two questions about one image, and the parts kept for each.")
    default = os.environ.get("QGSA_MODEL") or (str(TINY) if TINY.is_dir() else None)
    parser.add_argument(
        "--model", default=default, required=not default, help="Hub id or folder; QGSA_MODEL by default"
    )
    try:
        model, processor = load(parser.parse_args().model)
        model.tune()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    # The first answer of a process is slower than all others and would count against QGSA.
    ask(model, processor, Image.new("RGB", (64, 64)), "what is this?", model.config.max_visual_tokens)
    build(model, processor).launch(theme=THEME, css=CSS, show_error=True)


if __name__ == "__main__":
    main()
