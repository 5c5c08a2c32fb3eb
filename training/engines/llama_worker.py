"""llama.cpp through llama-cpp-python: answers with the GGUF files of `make llama`.

    python -m training.engines.llama_worker FOLDER THREADS

FOLDER holds `model.gguf`, the text model, and `mmproj.gguf`, encoder and connector.
"""

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp
from PIL import Image

from training.engines.protocol import serve


CONTEXT = 4096  # positions; 17 tiles of SmolVLM with their markers take 1200
BATCH = 512  # positions per step, llama.cpp's default
ONE_VIEW = 64  # visual tokens of one tile: with this limit an image is a single slice and its overview


def open_encoder(path: Path, model: llama_cpp.Llama, threads: int, max_tokens: int | None = None):
    """The encoder in a GGUF file. Raises ValueError if llama.cpp cannot read it.

    Args:
        max_tokens: limit on the visual tokens of an image; that of the file by default.
    """
    options = mtmd_cpp.mtmd_context_params_default()
    options.n_threads, options.print_timings = threads, False
    if max_tokens is not None:
        options.image_max_tokens = max_tokens
    encoder = mtmd_cpp.mtmd_init_from_file(str(path).encode(), model.model, options)
    if encoder is None:
        raise ValueError(f"{path}: llama.cpp cannot read it")
    return encoder


@contextmanager
def tokenized(encoder, prompt: str, image: Image.Image) -> Iterator[list]:
    """The prompt and its image as llama.cpp cuts them: chunks of text and chunks of one tile each, in order."""
    pixels = np.asarray(image)
    bitmap = mtmd_cpp.mtmd_bitmap_init(*image.size, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
    chunks = mtmd_cpp.mtmd_input_chunks_init()
    try:
        data = prompt.encode()
        text = mtmd_cpp.mtmd_input_text(data, len(data), False, True)
        bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
        check(mtmd_cpp.mtmd_tokenize(encoder, chunks, ctypes.byref(text), bitmaps, 1))
        count = mtmd_cpp.mtmd_input_chunks_size(chunks)
        yield [mtmd_cpp.mtmd_input_chunks_get(chunks, number) for number in range(count)]
    finally:
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        mtmd_cpp.mtmd_bitmap_free(bitmap)


def is_tile(chunk) -> bool:
    return mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE


def without_slices(chunks: list) -> list:
    """The chunks without any tile but the last one, the overview; llama.cpp itself encodes at least one slice."""
    tiles = [chunk for chunk in chunks if is_tile(chunk)]
    return [chunk for chunk in chunks if chunk not in tiles[:-1]]


def check(code: int):
    """Raise ValueError if a function of llama.cpp reports an error."""
    if code != 0:
        raise ValueError(f"llama.cpp: error {code}")


def read(model: llama_cpp.Llama, encoder, chunks: list) -> float:
    """Encode the tiles and fill the cache of the text model. Returns the seconds of the former."""
    place, vision = llama_cpp.llama_pos(0), 0.0
    for chunk in chunks:
        cache = (place, llama_cpp.llama_seq_id(0), BATCH)
        if is_tile(chunk):
            began = time.perf_counter()
            check(mtmd_cpp.mtmd_encode_chunk(encoder, chunk))
            vision += time.perf_counter() - began
            features = mtmd_cpp.mtmd_get_output_embd(encoder)
            rest = (ctypes.byref(place), mtmd_cpp.mtmd_helper_post_decode_callback(), None)
            check(mtmd_cpp.mtmd_helper_decode_image_chunk(encoder, model.ctx, chunk, features, *cache, *rest))
        else:
            last = chunk is chunks[-1]
            rest = (last, ctypes.byref(place))
            check(mtmd_cpp.mtmd_helper_eval_chunk_single(encoder, model.ctx, chunk, *cache, *rest))
    return vision


def best(model: llama_cpp.Llama) -> int:
    """The most likely next token."""
    logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())


def decode(model: llama_cpp.Llama, new_tokens: int) -> list[int]:
    """Greedy tokens after what was read; the end of an answer does not stop them."""
    found = [best(model)]
    while len(found) < new_tokens:
        token = (llama_cpp.llama_token * 1)(found[-1])
        check(llama_cpp.llama_decode(model.ctx, llama_cpp.llama_batch_get_one(token, 1)))
        found.append(best(model))
    return found


def load(folder: str, threads: str):
    """A function that answers, see `serve`, and a description; two encoders, one for each limit."""
    paths = [Path(folder, "model.gguf"), Path(folder, "mmproj.gguf")]
    count = int(threads)
    model = llama_cpp.Llama(
        str(paths[0]), n_ctx=CONTEXT, n_batch=BATCH, n_threads=count, n_threads_batch=count, verbose=False
    )
    encoders = {"dense": open_encoder(paths[1], model, count)}
    encoders["dense-global-only"] = open_encoder(paths[1], model, count, ONE_VIEW)
    marker = mtmd_cpp.mtmd_default_marker().decode()

    def answer(image: str, question: str, new_tokens: int, system: str, tiles: int, tokens: int) -> dict:
        picture = Image.open(image).convert("RGB")
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), False)
        began = time.perf_counter()
        prompt = f"<|im_start|>User:{marker}{question}<end_of_utterance>\nAssistant:"
        with tokenized(encoders[system], prompt, picture) as chunks:
            ready = time.perf_counter()
            chunks = chunks if system == "dense" else without_slices(chunks)
            vision = read(model, encoders[system], chunks)
            middle = time.perf_counter()
            decode(model, new_tokens)
        end = time.perf_counter()
        parts = {"processing": ready - began, "vision": vision, "prefill": middle - ready - vision}
        return {**parts, "decode": end - middle, "total": end - began}

    size = sum(path.stat().st_size for path in paths)
    return answer, {"version": f"llama.cpp {llama_cpp.__version__}", "weight_bytes": size}


if __name__ == "__main__":
    serve(load)
