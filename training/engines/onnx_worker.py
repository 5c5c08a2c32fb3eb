"""ONNX Runtime: answers with the graphs and the code of a folder written by `export.py --format onnx`.

    python -m training.engines.onnx_worker FOLDER VARIANT THREADS

FOLDER has to be on the import path: it holds `qgsa_onnx`.
"""

import time
from pathlib import Path

import onnxruntime
from PIL import Image
from qgsa_onnx import OnnxModel, chat_prompt

from training.engines.protocol import serve


class TimedModel(OnnxModel):
    """A model that notes when each of its graphs started and ended."""

    def run(self, name, **feeds):
        began = time.perf_counter()
        outputs = super().run(name, **feeds)
        self.spans.append((name, began, time.perf_counter()))
        return outputs

    def time(self, prompt: str, image: Image.Image, **options) -> dict[str, float]:
        """Seconds of an answer by part; cutting tiles, and all that is not a graph, is processing."""
        self.spans, began = [], time.perf_counter()
        self.generate(prompt, [image], **options)
        total, first = time.perf_counter() - began, [name for name, *_ in self.spans].index("decoder_model_merged")
        vision = sum(end - start for name, start, end in self.spans if name == "vision_encoder")
        before = sum(end - start for _, start, end in self.spans[: first + 1])
        decode = began + total - self.spans[first][2]
        parts = {"vision": vision, "prefill": before - vision, "decode": decode}
        return {"processing": total - sum(parts.values()), **parts, "total": total}


def load(folder: str, variant: str, threads: str):
    """A function that answers, see `serve`, and a description."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as OnnxModel has it
    model = TimedModel(folder, variant, sess_options=options, providers=["CPUExecutionProvider"])
    model.stops = set()  # all answers must have the same length
    budget = ("tiles", "visual_tokens")
    settings = model.settings

    def answer(image: str, question: str, new_tokens: int, system: str, tiles: int, tokens: int) -> dict:
        model.settings = settings | {"do_image_splitting": system != "dense-global-only"}
        limits = {f"{bound}_{name}": each for bound in ("min", "max") for name, each in zip(budget, (tiles, tokens))}
        chosen = limits if system == "qgsa-attention" else {"selection": "dense"}
        picture = Image.open(image).convert("RGB")
        return model.time(chat_prompt(question), picture, max_new_tokens=new_tokens, **chosen)

    suffix = "" if variant == "fp32" else f"_{variant}"
    files = [Path(folder, "onnx", f"{name}{suffix}.onnx") for name in model.sessions]
    size = sum(path.stat().st_size for path in files)
    return answer, {"version": f"onnxruntime {onnxruntime.__version__}", "weight_bytes": size}


if __name__ == "__main__":
    serve(load)
