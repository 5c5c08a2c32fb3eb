"""ONNX Runtime: answers with the graphs and the code of a folder written by `export.py --format onnx`.

    python -m training.engines.onnx_worker FOLDER VARIANT THREADS

FOLDER has to be on the import path: it holds `qgsa_onnx`.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import onnxruntime
from PIL import Image
from qgsa_onnx import OnnxModel, chat_prompt
from qgsa_onnx.inputs import TiledImage
from qgsa_onnx.model import POINTER_GRAPHS

from training.engines.protocol import serve


ENCODERS = ("vision_encoder", "glance_encoder", "block_encoder")
# Selection, pointer and downscale of the glance of our systems.
OURS = {
    f"{name}{part}": (selection, pointer, scale)
    for name, pointer in (("qgsa", "selector"), ("qgsa-attention", "attention"))
    for part, selection, scale in (
        ("", "before_encoder", 1),
        ("-half-glance", "before_encoder", 2),
        ("-blocks", "blocks", 1),
        ("-blocks-half-glance", "blocks", 2),
    )
}


class TimedModel(OnnxModel):
    """A model that notes when each of its graphs started and ended."""

    def run(self, name, **feeds):
        began = time.perf_counter()
        outputs = super().run(name, **feeds)
        self.spans.append((name, began, time.perf_counter()))
        return outputs

    def time(self, prompt: str, image: Image.Image | TiledImage, **options) -> dict[str, float]:
        """Seconds of an answer by part; cutting tiles, and all that is not a graph, is processing."""
        self.spans, began = [], time.perf_counter()
        self.generate(prompt, [image], **options)
        total, first = time.perf_counter() - began, [name for name, *_ in self.spans].index("decoder_model_merged")
        vision = sum(end - start for name, start, end in self.spans if name in ENCODERS)
        before = sum(end - start for _, start, end in self.spans[: first + 1])
        decode = began + total - self.spans[first][2]
        parts = {"vision": vision, "prefill": before - vision, "decode": decode}
        return {"processing": total - sum(parts.values()), **parts, "total": total}


def load(folder: str, variant: str, threads: str):
    """A function that answers, see `serve`, and a description.

    Given questions to be answered `later`, after the first one about the image, it returns the seconds of each.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as OnnxModel has it
    model = TimedModel(folder, variant, sess_options=options, providers=["CPUExecutionProvider"])
    model.stops = set()  # all answers must have the same length
    budget = ("tiles", "visual_tokens")
    settings, config = model.settings, model.config

    def answer(
        image: str, question: str, new_tokens: int, system: str, tiles: int, tokens: int, later: Sequence[str] = ()
    ) -> dict:
        model.settings = settings | {"do_image_splitting": system != "dense-global-only"}
        chosen = {"selection": "dense"}
        if system in OURS:
            selection, pointer, scale = OURS[system]
            model.config = config | {"pointer": pointer, "glance_downscale": scale}
            limits = [
                (f"{bound}_{name}", each) for bound in ("min", "max") for name, each in zip(budget, (tiles, tokens))
            ]
            chosen = {"selection": selection, **dict(limits)}
        picture = Image.open(image).convert("RGB")
        chosen["max_new_tokens"] = new_tokens
        if not later:
            return model.time(chat_prompt(question), picture, **chosen)
        seen = model.open(picture)
        spent = [model.time(chat_prompt(each), seen, **chosen)["total"] for each in (question, *later)]
        return {"later": spent[1:]}

    for name in ("block_encoder", *POINTER_GRAPHS["attention"], *POINTER_GRAPHS["selector"]):
        if Path(folder, model.path(name)).is_file():
            model.session(name)  # before anything is timed
    size = sum(Path(folder, model.path(name)).stat().st_size for name in model.sessions)
    return answer, {"version": f"onnxruntime {onnxruntime.__version__}", "weight_bytes": size}


if __name__ == "__main__":
    serve(load)
