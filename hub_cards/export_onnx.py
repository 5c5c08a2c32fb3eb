"""The ONNX graphs of a checkpoint, in the layout of the published SmolVLM repositories.

Names of files, inputs and outputs are those that transformers.js reads (its sessions of image-text-to-text models,
`encode_image` of its Idefics3 model, and `utils/dtypes.js` for the suffixes of the variants) and that the example of
HuggingFaceTB/SmolVLM-256M-Instruct for onnxruntime feeds. The published files themselves were not at hand.

    vision_encoder        pixel_values, pixel_attention_mask -> image_features
    embed_tokens          input_ids -> inputs_embeds
    decoder_model_merged  inputs_embeds, attention_mask, position_ids, past_key_values.* -> logits, present.*

Ours are the encoder over blocks of tiles, the one over glances that are scaled down (`config.glance_downscale`), and
those of the pointers:

    block_encoder         pixel_blocks, patch_numbers, tile_numbers -> image_features
    glance_encoder        pixel_values -> image_features
    attention_pointer     inputs_embeds, position_ids, rows -> attention
    selector              question_embeds, glance -> relevance, question_state, complexity_logits
    selector_match        question_state, image_features, is_global -> scores

In every variant, floating-point inputs and outputs are float32. Attention over whole tiles is one node, the
`MultiHeadAttention` of ONNX Runtime, and other runtimes may not know it.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from torch import nn
from torch.nn.functional import avg_pool2d, scaled_dot_product_attention
from torch.onnx import register_custom_op_symbolic
from torch.onnx.symbolic_helper import parse_args
from transformers import AttentionInterface

from modeling_qgsa import QGSASmolVLMForConditionalGeneration
from modeling_qgsa.attention_qgsa import row_attention
from modeling_qgsa.compat_qgsa import CACHE
from modeling_qgsa.pointer_qgsa import attention_layers
from modeling_qgsa.vision_qgsa import patch_numbers


OPSET = 20  # the first with Gelu
MAX_BYTES = 2**31  # of a protobuf file
FUSED = "qgsa_onnx"  # attention of the encoder in the graphs


@dataclass(frozen=True)
class Graph:
    """A module to be traced, with an example and the names of its inputs and outputs.

    Args:
        example: one tensor per input.
        inputs, outputs: names, each with the names of its dynamic axes.
    """

    module: nn.Module
    example: tuple[torch.Tensor, ...]
    inputs: dict[str, dict[int, str]]
    outputs: dict[str, dict[int, str]]


class VisionEncoder(nn.Module):
    """Encoder and connector over the tiles of a batch."""

    def __init__(self, model):
        super().__init__()
        self.vision, self.connector = model.vision_model, model.connector
        patches = model.config.patches_per_side**2
        # A constant: every tile is full, also of small images, which the processor scales up.
        self.register_buffer("patches", torch.arange(patches)[None], persistent=False)

    def forward(self, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor) -> torch.Tensor:
        """Features `(tiles, P, D)` of the tiles of `pixel_values` `(B, tiles, 3, H, W)` that the mask shows.

        Tiles without a shown pixel are padding, as in the processor's output.
        """
        real = pixel_attention_mask.flatten(2).any(-1)
        embeddings = self.vision.embeddings
        hidden = embeddings.patch_embedding(pixel_values[real]).flatten(2).transpose(1, 2)
        hidden = hidden + embeddings.position_embedding(self.patches)
        hidden = self.vision.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
        return self.connector(self.vision.post_layernorm(hidden))


class GlanceEncoder(nn.Module):
    """Encoder and connector over global views that are scaled down, see `encode_scaled_down`."""

    def __init__(self, model):
        super().__init__()
        self.vision, self.connector = model.vision_model, model.connector
        side, self.scale = model.config.patches_per_side, model.config.glance_downscale
        patches = torch.arange(side**2).view(side, side)[:: self.scale, :: self.scale].flatten()
        self.register_buffer("patches", patches[None], persistent=False)
        self.seen = side // self.scale

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features `(images, P, D)` of whole global views, `(images, 3, S, S)`."""
        embeddings, encoder = self.vision.embeddings, self.vision.encoder
        hidden = embeddings.patch_embedding(avg_pool2d(pixel_values, self.scale)).flatten(2).transpose(1, 2)
        hidden = hidden + embeddings.position_embedding(self.patches)
        hidden = self.vision.post_layernorm(encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state)
        states = hidden.view(-1, self.seen, 1, self.seen, 1, hidden.shape[-1])
        states = states.expand(-1, -1, self.scale, -1, self.scale, -1)
        return self.connector(states.reshape(-1, (self.seen * self.scale) ** 2, hidden.shape[-1]))


class BlockEncoder(nn.Module):
    """Encoder and connector over some blocks of the tiles of an image, see `encode_blocks`."""

    def __init__(self, model):
        super().__init__()
        self.vision, self.connector = model.vision_model, model.connector
        self.patches = model.config.scale_factor**2

    def forward(self, pixel_blocks, patch_numbers, tile_numbers) -> torch.Tensor:
        """Features `(blocks, D)`.

        Args:
            pixel_blocks: `(blocks, 3, side, side)`, the pixels of a visual token each.
            patch_numbers: `(blocks, scale_factor ** 2)` int64, the number of every patch within its tile.
            tile_numbers: `(blocks,)` int64; patches attend to those of their own tile.
        """
        embeddings = self.vision.embeddings
        hidden = embeddings.patch_embedding(pixel_blocks).flatten(2).transpose(1, 2)
        hidden = (hidden + embeddings.position_embedding(patch_numbers)).reshape(1, -1, hidden.shape[-1])
        owner = tile_numbers[:, None].expand(-1, self.patches).reshape(-1)
        mask = torch.where(owner[:, None] == owner, 0.0, torch.finfo(torch.float32).min)[None, None]
        hidden = self.vision.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
        hidden = self.vision.post_layernorm(hidden)
        return self.connector.modality_projection(hidden.reshape(-1, self.patches * hidden.shape[-1]))


@torch.library.custom_op("qgsa_onnx::attend_to_all", mutates_args=())
def attend_to_all(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float
) -> torch.Tensor:
    """Attention without a mask between states `(B, L, D)`, in one node of the graph."""
    split = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key, value))
    return scaled_dot_product_attention(*split, scale=scale).transpose(1, 2).flatten(2)


@parse_args("v", "v", "v", "i", "f")
def multi_head_attention(graph, query, key, value, heads: int, scale: float):
    """The node of [`attend_to_all`]."""
    name = "com.microsoft::MultiHeadAttention"
    return graph.op(name, query, key, value, num_heads_i=heads, scale_f=scale).setType(query.type())


def attention_of_graphs(module, query, key, value, attention_mask, scaling: float, **kwargs):
    """Attention of the encoder, in the interface of transformers, over `(B, heads, L, head_dim)`.

    With a mask, as over blocks of several tiles, it is plain products and softmax.
    """
    if attention_mask is None:
        states = (each.transpose(1, 2).flatten(2) for each in (query, key, value))
        return attend_to_all(*states, query.shape[1], scaling).unflatten(-1, (query.shape[1], -1)), None
    weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


register_custom_op_symbolic("qgsa_onnx::attend_to_all", multi_head_attention, OPSET)
AttentionInterface.register(FUSED, attention_of_graphs)


class TracedCache:
    """Keys and values of the past, in the interface by which decoder layers extend a cache."""

    def __init__(self, past: tuple[torch.Tensor, ...]):
        self.past = past
        self.present: list[torch.Tensor] = []

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *args, **kwargs) -> list[torch.Tensor]:
        extended = [torch.cat(pair, dim=2) for pair in zip(self.past[2 * layer : 2 * layer + 2], (key, value))]
        self.present += extended
        return extended


def causal_mask(shown: torch.Tensor, length: int) -> torch.Tensor:
    """The mask added to attention weights, `(B, 1, length, columns)`: the last rows of a causal one.

    Args:
        shown: `(B, columns)`, 0 for padding.
        length: the number of rows.
    """
    columns = torch.arange(shown.shape[1], device=shown.device)
    visible = (columns <= columns[shown.shape[1] - length :, None]) & shown[:, None, None].bool()
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)


class Decoder(nn.Module):
    """Text model and language head, with the cache as tensors."""

    def __init__(self, text_model, lm_head):
        super().__init__()
        self.text_model, self.lm_head = text_model, lm_head

    def forward(self, inputs_embeds, attention_mask, position_ids, *past) -> tuple[torch.Tensor, ...]:
        """Logits `(B, L, V)`, then keys and values of each layer, `(B, heads, past + L, head_dim)`.

        Args:
            inputs_embeds: `(B, L, D)`.
            attention_mask: `(B, past + L)`, 0 for padding.
            position_ids: `(B, L)`.
            past: keys and values of each layer, `(B, heads, past, head_dim)`; past may be 0.
        """
        cache, hidden = TracedCache(past), inputs_embeds
        mask = causal_mask(attention_mask, hidden.shape[1])
        rotary = self.text_model.rotary_emb(hidden, position_ids)
        for layer in self.text_model.layers:
            hidden = layer(hidden, attention_mask=mask, **{CACHE: cache}, position_embeddings=rotary)
        return self.lm_head(self.text_model.norm(hidden)), *cache.present


class AttentionPointer(nn.Module):
    """The attention of chosen rows of a prompt in the first layers of the text model."""

    def __init__(self, text_model, layers: int):
        super().__init__()
        self.text_model, self.layers = text_model, layers

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Attention `(B, layers, R, L)`, averaged over heads, of the positions `rows` `(B, R)` to all of the prompt.

        Args:
            inputs_embeds: `(B, L, D)`, without padding.
            position_ids: `(B, L)`.
        """
        hidden, shown = inputs_embeds, torch.ones_like(position_ids)
        mask, rotary = causal_mask(shown, hidden.shape[1]), self.text_model.rotary_emb(hidden, position_ids)
        maps = []
        for number, layer in enumerate(self.text_model.layers[: self.layers]):
            if number:
                previous = self.text_model.layers[number - 1]
                hidden = previous(hidden, attention_mask=mask, position_embeddings=rotary)
            maps.append(row_attention(layer, hidden, rotary, shown.bool(), rows).mean(1))
        return torch.stack(maps, dim=1)


class Selector(nn.Module):
    """The trained selector and the complexity estimator over one question without padding."""

    def __init__(self, model):
        super().__init__()
        self.selector, self.estimator = model.selector, model.complexity_estimator

    def forward(self, question_embeds: torch.Tensor, glance: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Relevance `(I, C)`, question state `(I, D)` and logits of the complexities `(I, levels)`.

        Args:
            question_embeds: `(I, Q, D)`, the words of the question only.
            glance: `(I, C, D)`.
        """
        relevance, state = self.selector.read(question_embeds[:, -self.selector.max_question_tokens :], None, glance)
        present = torch.ones_like(question_embeds[..., 0])
        return relevance, state, self.estimator(question_embeds, present, glance)


class SelectorMatch(nn.Module):
    """How well encoded tokens match the question."""

    def __init__(self, model):
        super().__init__()
        self.selector = model.selector

    def forward(self, question_state, image_features, is_global) -> torch.Tensor:
        return self.selector.match_tokens(question_state, image_features, is_global)


def graphs_of(model: QGSASmolVLMForConditionalGeneration, pointers: list[str]) -> dict[str, Graph]:
    """The graphs of a checkpoint by file name: those of the published repositories, and ours."""
    base, text = model.model, model.config.text_config
    embeds, positions = torch.randn(2, 5, text.hidden_size), torch.arange(5).expand(2, 5)
    head = torch.randn(2, text.num_key_value_heads, 3, text.head_dim)
    cache = [f"{layer}.{part}" for layer in range(text.num_hidden_layers) for part in ("key", "value")]
    pixels = torch.randn(2, 2, 3, *[model.config.vision_config.image_size] * 2)
    prompt, tiles = {0: "batch", 1: "sequence"}, {0: "batch", 1: "tiles"}
    return {
        "vision_encoder": Graph(
            VisionEncoder(base),
            (pixels, torch.ones_like(pixels[:, :, 0], dtype=torch.bool)),
            {"pixel_values": tiles, "pixel_attention_mask": tiles},
            {"image_features": {0: "tiles_total"}},
        ),
        "embed_tokens": Graph(
            base.get_input_embeddings(), (positions,), {"input_ids": prompt}, {"inputs_embeds": prompt}
        ),
        "decoder_model_merged": Graph(
            Decoder(base.text_model, model.lm_head),
            (embeds, torch.ones(2, 8, dtype=torch.long), positions, *[head] * len(cache)),
            {"inputs_embeds": prompt, "attention_mask": {0: "batch", 1: "total"}, "position_ids": prompt}
            | {f"past_key_values.{name}": {0: "batch", 2: "past"} for name in cache},
            {"logits": prompt} | {f"present.{name}": {0: "batch", 2: "total"} for name in cache},
        ),
        **part_graphs(base, pixels[0]),
        **{name: graph for each in pointers for name, graph in pointer_graphs(model, each, embeds, positions).items()},
    }


def part_graphs(model, pixels: torch.Tensor) -> dict[str, Graph]:
    """The encoder over blocks, and over a glance that is scaled down, with an example of tiles `(2, 3, S, S)`."""
    config = model.config
    side, numbers = config.scale_factor * config.vision_config.patch_size, patch_numbers(1, config.scale_factor, None)
    blocks, images = {0: "blocks"}, {0: "images"}
    graphs = {
        "block_encoder": Graph(
            BlockEncoder(model),
            (pixels[:, :, :side, :side].repeat(2, 1, 1, 1), numbers.repeat(4, 1), torch.tensor([0, 0, 0, 1])),
            {"pixel_blocks": blocks, "patch_numbers": blocks, "tile_numbers": blocks},
            {"image_features": blocks},
        )
    }
    if config.glance_downscale > 1:
        glance = Graph(GlanceEncoder(model), (pixels,), {"pixel_values": images}, {"image_features": images})
        graphs["glance_encoder"] = glance
    return graphs


def pointer_graphs(model, pointer: str, embeds: torch.Tensor, positions: torch.Tensor) -> dict[str, Graph]:
    """The graphs of a pointer, with an example of word embeddings `(2, 5, D)` and their positions."""
    config, base = model.config, model.model
    if pointer == "attention":
        weights = config.attention_weights
        layers = attention_layers(config.text_config.num_hidden_layers) if weights is None else len(weights)
        prompt = {0: "batch", 1: "sequence"}
        return {
            "attention_pointer": Graph(
                AttentionPointer(base.text_model, layers),
                (embeds, positions, positions[:, 2:]),
                {"inputs_embeds": prompt, "position_ids": prompt, "rows": {0: "batch", 1: "rows"}},
                {"attention": {0: "batch", 2: "rows", 3: "sequence"}},
            )
        }
    glance, images, tiles = torch.randn(2, config.tokens_per_tile, embeds.shape[-1]), {0: "images"}, {0: "tiles"}
    return {
        "selector": Graph(
            Selector(base),
            (embeds, glance),
            {"question_embeds": {0: "images", 1: "words"}, "glance": images},
            {"relevance": images, "question_state": images, "complexity_logits": images},
        ),
        "selector_match": Graph(
            SelectorMatch(base),
            (embeds[:, 0], glance, torch.tensor([True, False])),
            {"question_state": tiles, "image_features": tiles, "is_global": tiles},
            {"scores": tiles},
        ),
    }


def export_graphs(
    model: QGSASmolVLMForConditionalGeneration, folder: Path, variants: list[str], pointers: list[str] | None = None
):
    """Write every graph of `model` to `folder`, once per variant; the model keeps their attention, and float32.

    Args:
        pointers: those that get graphs; by default the configured one.

    Raises ValueError if a graph is too large for a file, the selector that points was never trained, vision does not
    take part in every layer of the text model, or counts are exact or positions compact.
    """
    if model.config.vision_layers is not None or model.config.vision_policy:
        raise ValueError(
            "format ('onnx'): in the graphs all layers are full: set vision_layers to None and vision_policy to False"
        )
    if model.config.positions_per_image is not None or model.config.positions != "original":
        raise ValueError(
            "format ('onnx'): its runtime has neither exact counts nor compact positions: set positions_per_image to "
            "None and positions to 'original'"
        )
    pointers = pointers or [model.config.pointer]
    if "selector" in pointers:
        model.model.selector.check_trained()
    model.set_attn_implementation("eager")  # plain products and softmax, which every runtime and quantizer reads
    model.model.vision_model.set_attn_implementation(FUSED)
    graphs = graphs_of(model.float().eval(), pointers)
    for name, graph in graphs.items():
        size = sum(weight.numel() for weight in graph.module.parameters()) * 4
        if size >= MAX_BYTES:
            raise ValueError(
                f"format ('onnx'): {name} has {size / 2**30:.1f} GB of weights, and a file at most 2: export a "
                "smaller checkpoint"
            )
    folder.mkdir(parents=True)
    for name, graph in graphs.items():
        traced = folder / f"{name}.onnx"
        trace(graph, traced)
        for variant, convert in CONVERT.items():
            if variant in variants:
                convert(traced, folder / f"{name}_{variant}.onnx")
        if "fp32" not in variants:
            traced.unlink()


@torch.no_grad()
def trace(graph: Graph, path: Path):
    """Trace a graph into a file, with constants folded."""
    with warnings.catch_warnings():
        # Shapes that the tracer takes for constants are constant here: heads and layers. The tests run other lengths.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph.module.eval(),
            graph.example,
            path,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_axes=graph.inputs | graph.outputs,
            opset_version=OPSET,
            dynamo=False,
        )
    # Also removes what stands between a weight that is used twice and its products, and would keep it in float32.
    quant_pre_process(path, path, skip_symbolic_shape=True)
    model = onnx.load(path)
    used = {node.domain for node in model.graph.node}
    imports = [each for each in model.opset_import if each.domain in used]  # others would bind to new runtimes
    del model.opset_import[:]
    model.opset_import.extend(imports)
    onnx.save(model, path)


def to_half(source: Path, target: Path):
    """Weights and arithmetic in float16."""
    half = OnnxModel(convert_float_to_float16(onnx.load(source), keep_io_types=True))
    half.topological_sort()  # the conversion appends its casts
    half.save_model_to_file(str(target))


def to_int8(source: Path, target: Path):
    """Weights of matrix products and embeddings in int8, by channel; activations are quantized as they come.

    Embeddings of positions stay in float32: there are few, and they would get one scale for all.
    """
    positions = [node.name for node in onnx.load(source).graph.node if "position_embedding" in node.name]
    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=positions,
    )


def to_four_bits(source: Path, target: Path):
    """Weights of matrix products in 4 bits, in blocks of 32; embeddings stay as they are."""
    logging.basicConfig()  # or else the following import sets the level of all loggers to INFO
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(source), block_size=32, is_symmetric=True, accuracy_level=4, op_types_to_quantize=("MatMul",)
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(target))


CONVERT: dict[str, Callable[[Path, Path], None]] = {"fp16": to_half, "int8": to_int8, "q4": to_four_bits}
