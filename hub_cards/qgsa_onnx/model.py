"""The flow of QGSA on ONNX Runtime: glance, point, look, keep, splice, answer. Sizes as in `inputs`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from .inputs import FAKE, IMAGE, Prompt, TiledImage, covered_by, find_question, patch_numbers
from .selection import (
    Budget,
    Pointing,
    attention_maps,
    complexity_at,
    read_attention,
    tile_relevance,
    token_cells,
    token_relevance,
    top_k_per_image,
)


try:
    import onnxruntime
except ImportError as error:
    raise ImportError("onnxruntime is not installed: pip install onnxruntime") from error


SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8", "q4": "_q4"}
GRAPHS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
POINTER_GRAPHS = {None: (), "attention": ("attention_pointer",), "selector": ("selector", "selector_match")}
GLANCE_FIRST = np.float32(1e3)  # more than any two log-probabilities differ by
FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
# Fields of QGSAConfig for a published checkpoint, as by `from_dense`, but without a pointer.
PUBLISHED = {
    "selection": "before_encoder",
    "min_tiles": 0,
    "max_tiles": 4,
    "keep_tile_markers": True,
    "pointer": None,
    "glance_downscale": 1,
}


@dataclass(frozen=True)
class Selection:
    """What was looked at and what was kept.

    Args:
        tiles: `(T,)` bool, the encoded tiles, global views included; of "blocks" also those encoded in part.
        kept: `(T, P)` bool, the visual tokens kept.
        relevance: `(I, C)` float32, probabilities of the cells of the glance.
        features: `(T, P, D)` float32, of the encoded tiles or blocks; 0 elsewhere.
    """

    tiles: np.ndarray
    kept: np.ndarray
    relevance: np.ndarray
    features: np.ndarray


@dataclass(frozen=True)
class Answer:
    """An answer: its text without special tokens, its token ids, and the selection that it was read from."""

    text: str
    ids: list[int]
    selection: Selection


class OnnxModel:
    """A checkpoint in ONNX format.

    Args:
        folder: written by `export.py --format onnx`, or a published SmolVLM with its `onnx` files.
        variant: "fp32", "fp16", "int8" or "q4": the files to load.
        session: options of `onnxruntime.InferenceSession`, such as `providers` and `sess_options`.

    Raises ValueError for an unknown variant or a folder of another model, FileNotFoundError for a missing file.
    """

    def __init__(self, folder: str | Path, variant: str = "fp32", **session: Any):
        folder = self.folder = Path(folder)
        if variant not in SUFFIXES:
            raise ValueError(f"variant ({variant!r}): choose from {', '.join(SUFFIXES)}")
        self.variant, self.config = variant, read_config(folder)
        self.settings = read_json(folder, "preprocessor_config.json")
        eos = read_json(folder, "generation_config.json")["eos_token_id"]
        self.stops = {eos} if isinstance(eos, int) else set(eos)
        self.tokenizer = Tokenizer.from_file(str(existing(folder, "tokenizer.json")))
        for token in (IMAGE, FAKE):
            if self.tokenizer.token_to_id(token) is None:
                raise ValueError(f"folder ({folder}) has a tokenizer without {token}: give one of SmolVLM")
        options = onnxruntime.SessionOptions()  # the idle threads of one graph must not spin while another one runs
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.options, self.sessions = {"sess_options": options} | session, {}
        names = [*GRAPHS, *POINTER_GRAPHS[self.config["pointer"]]]
        names += ["glance_encoder"] * (self.config["glance_downscale"] > 1)
        for name in names:  # before any of them is loaded
            existing(folder, self.path(name))
        for name in names:
            self.session(name)

    def open(self, image: Image.Image) -> TiledImage:
        """An image for several questions: it is scaled once, and each of its whole tiles encoded at most once.

        Raises TypeError if it is not a PIL image, ValueError if it is too small or too narrow to be cut.
        """
        return TiledImage.of(image, self.settings)

    def generate(
        self,
        prompt: str,
        images: Sequence[Image.Image | TiledImage],
        max_new_tokens: int = 20,
        visual_token_scores: np.ndarray | None = None,
        **budget: Any,
    ) -> Answer:
        """Answer a prompt greedily.

        Args:
            prompt: with one `<image>` per image, in the chat format of the checkpoint, see `chat_prompt`.
            images: PIL images, or those that `open` made of them; may be empty.
            visual_token_scores: `(N,)`, scores of all visual tokens in prompt order, global views included, in place
                of the pointer's. The score of a tile is the highest of its tokens.
            budget: selection ("before_encoder", "blocks" or "dense"), min_tiles, max_tiles, min_visual_tokens and
                max_visual_tokens override the configuration; max_image_tokens is one number in place of the limits,
                see `Budget.limited_to`.

        Raises ValueError if prompt, images, scores or budget do not fit together, or nothing tells where to look;
        TypeError for an argument of the wrong type.
        """
        limits = Budget.of(self.config, budget)
        if limits.selection == "blocks" and not (self.folder / self.path("block_encoder")).is_file():
            raise ValueError(
                f'selection ("blocks"): {self.folder} has no {self.path("block_encoder")}: export it again, or choose '
                "before_encoder or dense"
            )
        cut = [image if isinstance(image, TiledImage) else self.open(image) for image in images]
        if any(image.settings != self.settings for image in cut):
            raise ValueError("images: opened by a model that cuts them otherwise: open them with this one")
        inputs = Prompt.of(self.tokenizer, prompt, cut, self.config["tokens_per_tile"])
        scores = self.check_scores(inputs, limits, visual_token_scores)
        embeds = self.embed(inputs.input_ids)
        chosen = self.select(inputs, limits, embeds, scores)
        # splice
        embeds[inputs.token_positions[chosen.kept]] = chosen.features[chosen.kept]
        keep = inputs.keep(chosen.kept, self.config["keep_tile_markers"])
        # answer
        ids = list(self.decode(embeds[keep], keep, max_new_tokens))
        return Answer(self.tokenizer.decode(ids, skip_special_tokens=True).strip(), ids, chosen)

    def select(self, prompt: Prompt, limits: Budget, embeds: np.ndarray, scores: np.ndarray | None) -> Selection:
        """Glance, point, look and keep.

        Args:
            embeds: `(L, D)`, word embeddings of the prompt.
            scores: `(T, P)` in place of the pointer's.
        """
        is_global, config = prompt.is_global, self.config
        pointing = Pointing.nowhere(len(prompt.images), config["tokens_per_tile"])
        features = np.zeros((*prompt.token_positions.shape, embeds.shape[1]), np.float32)
        tiles, everything = np.ones(len(is_global), bool), np.ones(features.shape[:2], bool)
        question, answer = find_question(prompt, config) if config["pointer"] else (everything, 0)
        if limits.selection == "dense" or not prompt.images or (scores is None and not question.any()):
            features[:] = self.encode(prompt, tiles, scaled=limits.selection != "dense")
            return Selection(tiles, everything, np.exp(pointing.relevance), features)
        # glance, point
        features[is_global] = glance = self.encode(prompt, is_global)
        if config["pointer"] and question.any() and (scores is None or not limits.is_fixed):
            point = self.point_by_attention if config["pointer"] == "attention" else self.point_by_selector
            pointing = point(prompt, limits, embeds, question, answer, glance)
        if not np.isfinite(pointing.relevance).all():
            raise ValueError("relevance holds NaN or infinite values: choose another variant, or check the weights")
        m, k = limits.resolve(pointing.complexity)
        # look
        of_tiles = tile_relevance(np.exp(pointing.relevance), prompt) if scores is None else scores.max(1)
        looked = everything & top_k_per_image(of_tiles, ~is_global, prompt, m)[:, None]
        if limits.selection == "blocks":
            of_places = token_relevance(pointing.relevance, prompt) if scores is None else scores
            looked = top_k_per_image(of_places, looked, prompt, k)
        whole = looked.all(1)
        features[whole], part = self.encode(prompt, whole), looked & ~whole[:, None]
        features[part] = self.encode_blocks(prompt, part)
        looked |= is_global[:, None]
        # keep
        if scores is None:
            places = np.take_along_axis(pointing.relevance[prompt.tile_image], token_cells(prompt), axis=1)
            scores = places + self.match(prompt, limits, pointing, features)
        kept = top_k_per_image(scores, looked, prompt, k)
        return Selection(looked.any(1), kept, np.exp(pointing.relevance), features)

    def decode(self, embeds: np.ndarray, positions: np.ndarray, max_new_tokens: int) -> Iterator[int]:
        """Token ids of the answer, up to and including a stop token.

        Args:
            embeds: `(K, D)`, the kept part of the prompt.
            positions: `(K,)` int64, its places in the prompt; the last one is always kept.
        """
        decoder = self.sessions["decoder_model_merged"]
        past = {
            each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), FLOATS[each.type])
            for each in decoder.get_inputs()
            if each.name.startswith("past_key_values")
        }
        names = [each.name.replace("present", "past_key_values") for each in decoder.get_outputs()[1:]]
        shown = len(positions)
        for _ in range(max_new_tokens):
            mask = np.ones((1, shown), np.int64)
            prompt = {"inputs_embeds": embeds[None], "attention_mask": mask, "position_ids": positions[None]}
            logits, *present = self.run("decoder_model_merged", **prompt, **past)
            token = int(logits[0, -1].argmax())
            yield token
            if token in self.stops:
                return
            past, shown = dict(zip(names, present)), shown + 1
            embeds, positions = self.embed(np.array([token])), positions[-1:] + 1

    def point_by_attention(
        self,
        prompt: Prompt,
        limits: Budget,
        embeds: np.ndarray,
        question: np.ndarray,
        answer: int,
        glance: np.ndarray,
    ) -> Pointing:
        """Read prompt and glances alone: the attention of the question's words and of the answer's position.

        Args:
            question: `(L,)` bool.
            answer: the position that predicts the first token of the answer.
            glance: `(I, C, D)`, features of the global views.
        """
        places = prompt.token_positions[prompt.is_global]
        embeds = embeds.copy()
        embeds[places] = glance
        keep = prompt.keep(np.broadcast_to(prompt.is_global[:, None], prompt.token_positions.shape))
        words = np.flatnonzero(question & ~covered_by(prompt.input_ids, self.config["user_token_ids"]))
        rows = np.searchsorted(keep, np.append(words, answer))
        shorter = {"inputs_embeds": embeds[None, keep], "position_ids": keep[None], "rows": rows[None]}
        (attention,) = self.run("attention_pointer", **shorter)
        maps = attention_maps(attention[0], np.searchsorted(keep, places))
        return read_attention(maps, prompt, limits, self.config)

    def point_by_selector(
        self,
        prompt: Prompt,
        limits: Budget,
        embeds: np.ndarray,
        question: np.ndarray,
        answer: int,
        glance: np.ndarray,
    ) -> Pointing:
        """Read the words of the question and each glance by the trained selector; arguments as for attention."""
        words = np.repeat(embeds[None, question], len(glance), axis=0)
        relevance, state, logits = self.run("selector", question_embeds=words, glance=glance)
        return Pointing(relevance, complexity_at(logits, self.config["complexity_quantile"]), state)

    def match(self, prompt: Prompt, limits: Budget, pointing: Pointing, features: np.ndarray) -> np.ndarray:
        """What adds to the relevance of the place of every visual token, `(T, P)`, given their features `(T, P, D)`.

        That is how well they match the question for a selector. Otherwise the glance stays in view if the budget has
        more room.
        """
        if self.config["pointer"] == "selector":
            state = pointing.question_state[prompt.tile_image]
            feeds = {"question_state": state, "image_features": features, "is_global": prompt.is_global}
            return self.run("selector_match", **feeds)[0]
        first = prompt.is_global & (limits.max_visual_tokens > features.shape[1])
        return np.where(first, GLANCE_FIRST, np.float32(0))[:, None]

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Word embeddings of `ids` `(L,)`: `(L, D)` float32."""
        return self.run("embed_tokens", input_ids=ids[None])[0][0].astype(np.float32)

    def encode(self, prompt: Prompt, tiles: np.ndarray, scaled: bool = True) -> np.ndarray:
        """Features of the chosen `tiles` `(T,)` bool, `(n, P, D)` float32; on CPUs, one by one is faster than all.

        Args:
            scaled: whether the global views of images that have tiles are scaled down by `config.glance_downscale`.
        """
        smaller = prompt.is_global & prompt.has_tiles & scaled & (self.config["glance_downscale"] > 1)
        encoded = []
        for tile in np.flatnonzero(tiles).tolist():
            name = "glance_encoder" if smaller[tile] else "vision_encoder"
            image, number = prompt.place(tile)
            key = number, self.session(name)
            if key not in image.encoded:
                pixels = image.cut(number)[None]
                whole = np.ones((1, 1, *pixels.shape[-2:]), bool)
                feeds = {"pixel_values": pixels if smaller[tile] else pixels[None], "pixel_attention_mask": whole}
                image.encoded[key] = self.run(name, **feeds)[0][0].astype(np.float32, copy=False)
            encoded.append(image.encoded[key])
        width = self.config["text_config"]["hidden_size"]
        return np.array(encoded, np.float32).reshape(-1, self.config["tokens_per_tile"], width)

    def encode_blocks(self, prompt: Prompt, chosen: np.ndarray) -> np.ndarray:
        """Features of the `chosen` blocks of tiles, `(T, P)` bool, `(n, D)` float32; those of an image together."""
        scale, encoded = self.config["scale_factor"], []
        size = scale * self.config["vision_config"]["patch_size"]
        numbers = patch_numbers(round(chosen.shape[1] ** 0.5), scale)
        for image in np.unique(prompt.tile_image[chosen.any(1)]):
            tile, block = np.nonzero(chosen & (prompt.tile_image == image)[:, None])
            pixels = [prompt.pixel_blocks(each, block[tile == each], size) for each in np.unique(tile)]
            feeds = {"pixel_blocks": np.concatenate(pixels), "patch_numbers": numbers[block], "tile_numbers": tile}
            encoded += self.run("block_encoder", **feeds)
        return np.concatenate(encoded or [np.zeros((0, self.config["text_config"]["hidden_size"]))]).astype(np.float32)

    def path(self, name: str) -> str:
        """The file of a graph, relative to the folder."""
        return f"onnx/{name}{SUFFIXES[self.variant]}.onnx"

    def session(self, name: str) -> onnxruntime.InferenceSession:
        """The session of a graph; those that not every call needs are loaded when they are first needed."""
        if name not in self.sessions:
            path = existing(self.folder, self.path(name))
            self.sessions[name] = onnxruntime.InferenceSession(path, **self.options)
        return self.sessions[name]

    def run(self, name: str, **feeds: np.ndarray) -> list[np.ndarray]:
        """Outputs of a graph, which takes those of the `feeds` that it has inputs for, in its own float types."""
        session = self.session(name)
        inputs = {each.name: (feeds[each.name], each.type) for each in session.get_inputs()}
        return session.run(
            None,
            {name: array.astype(FLOATS.get(kind, array.dtype), copy=False) for name, (array, kind) in inputs.items()},
        )

    def check_scores(self, prompt: Prompt, limits: Budget, scores: np.ndarray | None) -> np.ndarray | None:
        """Given scores by tile, `(T, P)` float32. Raises ValueError if they do not fit or something is missing."""
        positioned = [each.name for each in self.sessions["decoder_model_merged"].get_inputs()]
        if limits.selection == "dense" or prompt.is_global.all():
            return None
        if "position_ids" not in positioned:
            raise ValueError(
                f"selection ({limits.selection!r}): the decoder has no position_ids, and counts what is kept: export "
                "it again, or use selection='dense'"
            )
        if scores is None:
            if self.config["pointer"] is None and limits.max_tiles:
                raise ValueError(
                    "visual_token_scores (None): this folder has no pointer to choose tiles: give scores, max_tiles=0 "
                    "or selection='dense'"
                )
            return None
        scores = np.asarray(scores, np.float32)
        if scores.shape != (prompt.token_positions.size,) or not np.isfinite(scores).all():
            raise ValueError(
                f"visual_token_scores (shape {scores.shape}) must hold a finite number for each of the "
                f"{prompt.token_positions.size} visual tokens"
            )
        return scores.reshape(prompt.token_positions.shape)


def existing(folder: Path, name: str) -> Path:
    """The path of a file. Raises FileNotFoundError if the folder lacks it."""
    if not (folder / name).is_file():
        raise FileNotFoundError(f"folder ({folder}) has no {name}: export it with --format onnx, or choose another")
    return folder / name


def read_json(folder: Path, name: str) -> dict:
    """Content of a JSON file. Raises FileNotFoundError if the folder lacks it."""
    return json.loads(existing(folder, name).read_text())


def read_config(folder: Path) -> dict:
    """`config.json`, with the defaults of a published checkpoint and `tokens_per_tile`.

    Raises ValueError for a model that is not a SmolVLM or Idefics3.
    """
    config = read_json(folder, "config.json")
    kind = config.get("model_type")
    if kind not in ("qgsa_smolvlm", "idefics3", "smolvlm"):
        raise ValueError(
            f"model_type ({kind!r} in {folder}) must be qgsa_smolvlm, idefics3 or smolvlm: choose another"
        )
    vision = config["vision_config"]
    tokens = (vision["image_size"] // vision["patch_size"] // config["scale_factor"]) ** 2
    whole = {"min_visual_tokens": tokens, "max_visual_tokens": 5 * tokens}  # of the glance and 4 tiles
    return {**PUBLISHED, **whole, **config, "tokens_per_tile": tokens}
