"""OpenVINO through optimum-intel: answers with a folder written by `optimum-cli export openvino`.

python -m training.engines.openvino_worker FOLDER THREADS
"""

import time
from importlib.metadata import version
from pathlib import Path

from optimum.intel import OVModelForVisualCausalLM
from PIL import Image
from transformers import AutoProcessor

from training.engines.protocol import serve


def load(folder: str, threads: str):
    """A function that answers, see `serve`, and a description."""
    processor = AutoProcessor.from_pretrained(folder)
    model = OVModelForVisualCausalLM.from_pretrained(folder, ov_config={"INFERENCE_NUM_THREADS": threads})
    model.generation_config.eos_token_id = None  # all answers must have the same length
    encode, marks = model.get_vision_embeddings, []

    def timed_encode(*args, **kwargs):
        began = time.perf_counter()
        features = encode(*args, **kwargs)
        if features is not None:  # which it is for every token after the first
            marks.append(time.perf_counter() - began)
        return features

    def note_logits(ids, logits):
        marks.append(time.perf_counter())
        return logits

    model.get_vision_embeddings = timed_encode

    def answer(image: str, question: str, new_tokens: int, system: str, tiles: int, tokens: int) -> dict:
        picture = Image.open(image).convert("RGB")
        marks.clear()
        began = time.perf_counter()
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        processor.image_processor.do_image_splitting = system != "dense-global-only"
        inputs = processor(text=text, images=[[picture]], return_tensors="pt")
        ready = time.perf_counter()
        length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        model.generate(**inputs, **length, do_sample=False, logits_processor=[note_logits])
        end = time.perf_counter()
        vision, first = marks[:2]
        parts = {"processing": ready - began, "vision": vision, "prefill": first - ready - vision}
        return {**parts, "decode": end - first, "total": end - began}

    size = sum(path.stat().st_size for path in Path(folder).glob("*_model.bin"))
    return answer, {"version": f"openvino {version('openvino')}", "weight_bytes": size}


if __name__ == "__main__":
    serve(load)
