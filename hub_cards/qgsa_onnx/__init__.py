"""QGSA-SmolVLM on ONNX Runtime, without torch and transformers: numpy, Pillow, tokenizers and onnxruntime.

    model = OnnxModel("outputs/hub/my-onnx", variant="int8")
    answer = model.generate(chat_prompt("what shape is on the red card?"), [image], max_new_tokens=8)
    print(answer.text)

The folder is one written by `export.py --format onnx`, which copies this package into it, or a published SmolVLM with
its `onnx` files. For several questions about an image, pass `model.open(image)`: none of its tiles is encoded twice.
"""

from .inputs import chat_prompt
from .model import Answer, OnnxModel


__all__ = ["Answer", "OnnxModel", "chat_prompt"]
