"""FLOPs of one answer by formula, and the tables made from them. A multiply-add counts as two.

Tests compare the formulas with `count_flops`, to within 0.1 %.
"""

import math
from collections.abc import Sequence

from modeling_qgsa.pointer_qgsa import attention_layers
from modeling_qgsa.schedule_qgsa import BLOCK_KERNEL, block_size


def vision_flops(config, sequences: list[int]) -> int:
    """FLOPs of encoder and connector.

    Args:
        config: a [`QGSAConfig`] or the config of a SmolVLM checkpoint.
        sequences: number of patches in each encoded sequence: a whole tile, or packed blocks.
    """
    vision, scale = config.vision_config, config.scale_factor**2
    width, flops = vision.hidden_size, 0
    for patches in sequences:
        layer = 2 * patches * width * (4 * width + 2 * vision.intermediate_size) + 4 * patches**2 * width
        embedding = 2 * patches * vision.num_channels * vision.patch_size**2 * width
        connector = 2 * (patches // scale) * width * scale * config.text_config.hidden_size
        flops += vision.num_hidden_layers * layer + embedding + connector
    return flops


def text_flops(config, new: int, seen: int = 0) -> int:
    """FLOPs of one pass of the text model over `new` tokens after `seen` cached ones, with one row of logits.

    Attention is counted the way the prefill kernels run it: every token attends to every other token.
    """
    text = config.text_config
    head = text.head_dim or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    projections = 2 * new * text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    attention = 4 * new * (seen + new) * queries
    return text.num_hidden_layers * (projections + attention) + 2 * text.hidden_size * text.vocab_size


def block_flops(config, visual: int, words: int, new_tokens: int = 1) -> tuple[int, int]:
    """FLOPs of a block in front of a cross layer, in prefill and decode; arguments as in `schedule_flops`.

    The convolution runs over all visual tokens, with a gap between tiles.
    """
    text = config.text_config
    heads, head = block_size(text)
    width, tiles = heads * head, -(-visual // config.tokens_per_tile)
    row = 2 * text.hidden_size * 2 * width + 4 * visual * width
    places = visual + (tiles - 1) * (BLOCK_KERNEL // 2)
    made = 2 * visual * text.hidden_size * 2 * width + 2 * places * 2 * width * BLOCK_KERNEL
    return (words * row + made, (new_tokens - 1) * row) if visual else (0, 0)


def schedule_flops(
    config, kinds: Sequence[str], visual: int, words: int, new_tokens: int = 1, pruned: tuple[int, int] | None = None
) -> dict[str, int]:
    """FLOPs of the text model for one answer, if its layers differ in how vision takes part.

    Args:
        config: a [`QGSAConfig`], whose `vision_cross` says how cross layers look.
        kinds: of all layers, "full", "cross" or "text".
        visual: number of visual tokens in the prompt.
        words: number of other tokens.
        new_tokens: number of answer tokens.
        pruned: `(layer, kept)`, the number of layers that see all visual tokens, and how many the others see.

    Returns `prefill` with one row of logits, `decode` of the remaining tokens, and `visual`, the part of both that
    would be missing without visual tokens.
    """
    text = config.text_config
    head = text.head_dim or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    whole = 2 * text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    head_of_text = 2 * text.hidden_size * text.vocab_size
    layer, kept = pruned or (len(kinds), visual)
    prefill, decode, without = head_of_text, (new_tokens - 1) * head_of_text, head_of_text * new_tokens
    for number, kind in enumerate(kinds):
        shown = {"full": visual, "cross": visual, "text": 0}[kind] if number < layer else {"text": 0}.get(kind, kept)
        if kind == "cross" and config.vision_cross == "block":
            block = block_flops(config, shown, words, new_tokens)
            prefill, decode, kind, shown = prefill + block[0], decode + block[1], "text", 0
        rows = words + shown * (kind == "full")
        prefill += rows * whole + 4 * rows * (words + shown) * queries
        prefill += 2 * shown * text.hidden_size * 2 * keys * (kind == "cross")
        without += words * whole + 4 * words**2 * queries
        for step in range(1, new_tokens):
            decode += whole + 4 * (words + shown + step) * queries
            without += whole + 4 * (words + step) * queries
    return {"prefill": prefill, "decode": decode, "visual": prefill + decode - without}


def cache_bytes(config, kinds: Sequence[str], visual: int, words: int, size: int = 4) -> int:
    """Bytes of keys and values that the text model holds of one prompt; arguments as in `schedule_flops`.

    Args:
        config: also the config of a SmolVLM checkpoint, whose layers are full.
        size: bytes of a number.
    """
    text = config.text_config
    head = text.head_dim or text.hidden_size // text.num_attention_heads
    own = text.num_key_value_heads * head
    width = math.prod(block_size(text)) if "cross" in kinds and config.vision_cross == "block" else own
    seen = {"full": own, "cross": width, "text": 0}
    return sum(words * own + visual * seen[kind] for kind in kinds) * 2 * size


def selector_flops(config, question: int, tiles: int) -> int:
    """FLOPs of selector and complexity estimator for one image.

    Args:
        question: number of question tokens.
        tiles: number of tiles with features, including the global view.
    """
    width, hidden, cells = config.text_config.hidden_size, config.selector_hidden_size, config.tokens_per_tile
    read = min(question, config.max_question_tokens)
    length = cells + read
    layers = config.selector_layers * (24 * length * hidden**2 + 4 * length**2 * hidden)
    ends = 2 * length * hidden * (width + 1)  # projection to the selector's width; relevance and word weights
    match = 4 * tiles * width * hidden * (1 + cells)
    estimator = 2 * hidden * (2 * width + config.complexity_levels)
    return layers + ends + match + estimator


def attention_pointer_flops(config, prompt: int, question: int) -> int:
    """FLOPs of reading the text model's own attention to the glance, for one image.

    Every layer but the last one that is read runs as a whole; of each one that is read, the queries of some rows and
    all keys are computed once more.

    Args:
        prompt: number of prompt tokens with the glance, without the high-resolution tiles.
        question: number of question tokens; the position that predicts the answer is read besides.
    """
    text, weights = config.text_config, config.attention_weights
    head = text.head_dim or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    layers = attention_layers(text.num_hidden_layers) if weights is None else len(weights)
    whole = 2 * prompt * text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    whole += 4 * prompt**2 * queries
    rows = question + 1
    read = 2 * text.hidden_size * (prompt * keys + rows * queries) + 2 * rows * prompt * queries
    return (layers - 1) * whole + layers * read


def estimate_flops(
    config,
    tiles: int,
    prompt: int,
    new_tokens: int,
    question: int | None = None,
    blocks: tuple[int, ...] = (),
    glance: int | None = None,
) -> dict[str, int]:
    """FLOPs of one answer about one image that has tiles, in the parts of `count_flops`.

    Args:
        tiles: number of tiles encoded as a whole, including the global view.
        prompt: number of prompt tokens that the text model reads, including the visual tokens kept.
        new_tokens: number of answer tokens.
        question: number of question tokens read by the pointer; None for a model that does not select.
        blocks: number of encoded blocks of each tile that is encoded in part.
        glance: number of prompt tokens that the attention pointer reads; None if the selector points.
    """
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    sequences = [patches] * tiles + [sum(blocks) * config.scale_factor**2] * bool(blocks)
    vision = vision_flops(config, sequences)
    if question is not None and config.glance_downscale > 1:
        vision -= glance_saving(config, patches)
    prefill = text_flops(config, prompt)
    if question is not None and glance is not None:
        prefill += attention_pointer_flops(config, glance, question)
    elif question is not None:
        prefill += selector_flops(config, question, tiles + len(blocks))
    decode = sum(text_flops(config, 1, prompt + step) for step in range(new_tokens - 1))
    return {"vision": vision, "prefill": prefill, "decode": decode, "total": vision + prefill + decode}


def glance_saving(config, patches: int) -> int:
    """FLOPs that `glance_downscale` saves on a global view of so many patches. The connector still reads all."""
    fewer = patches // config.glance_downscale**2
    connector = 2 * (patches - fewer) * config.vision_config.hidden_size * config.text_config.hidden_size
    return vision_flops(config, [patches]) - vision_flops(config, [fewer]) - connector


def cross_modal_attention(config, question: int, tokens: int) -> int:
    """FLOPs of the attention from `question` words to `tokens` visual tokens, over all layers of the text model."""
    text = config.text_config
    head = text.head_dim or text.hidden_size // text.num_attention_heads
    return text.num_hidden_layers * 4 * question * tokens * text.num_attention_heads * head


def paper_table(kept: int = 17, patch: int = 16) -> list[dict]:
    """The measure used in the QGSA paper: cross-modal attention, where every question word attends to every patch.

    The number of words and the width cancel out.

    Args:
        kept: number of patches kept (17 in the paper).
        patch: patch size in px.

    Returns:
        One row per image size of the paper: `pixels` per side, `patches`, `saved` (share of the FLOPs) and `times`
        (factor by which the FLOPs fall).
    """
    rows = []
    for pixels in (224, 336, 384, 448, 576):
        patches = (pixels // patch) ** 2
        rows.append({"pixels": pixels, "patches": patches, "saved": 1 - kept / patches, "times": patches / kept})
    return rows


def answer_table(config, question: int = 20, words: int = 43, new_tokens: int = 8, kept: int = 17) -> list[dict]:
    """FLOPs of an answer about an image of 4 x 4 tiles: dense, and three ways of keeping `kept` visual tokens.

    Args:
        question: number of question tokens.
        words: number of prompt tokens other than visual tokens and the markers of high-resolution tiles.
        new_tokens: number of answer tokens.
        kept: number of visual tokens kept.
    """
    visual = config.tokens_per_tile
    ways = (
        ("dense", 17, 17 * visual, 16, None, ()),
        ("qgsa-after-encoder", 17, kept, 2, question, ()),
        ("qgsa, m = 2", 3, kept, 2, question, ()),
        ("qgsa-blocks, m = 2", 1, kept, 2, question, (kept - kept // 2, kept // 2)),
    )
    rows = []
    for system, tiles, tokens, marked, asked, blocks in ways:
        flops = estimate_flops(config, tiles, words + tokens + 2 * marked, new_tokens, asked, blocks)
        flops["cross_modal_attention"] = cross_modal_attention(config, question, tokens)
        rows.append({"system": system, "visual_tokens_mean": tokens, "flops": flops})
    return rows


def format_tables(configs: dict) -> str:
    """The table of the paper, then that of `configs` (name to [`QGSAConfig`]), as Markdown."""
    lines = ["| image, px | patches | cross-modal attention saved at k = 17 | times fewer |", "|---|---|---|---|"]
    for row in paper_table():
        lines.append(f"| {row['pixels']} | {row['patches']} | {row['saved']:.1%} | {row['times']:.0f} |")
    lines += [
        "",
        "| architecture | system | cross-modal attention, GFLOPs | encoder | prefill | decode | total | vs dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, config in configs.items():
        rows = answer_table(config)
        for row in rows:
            parts = ("cross_modal_attention", "vision", "prefill", "decode", "total")
            flops = " | ".join(f"{row['flops'][part] / 1e9:.2f}" for part in parts)
            share = row["flops"]["total"] / rows[0]["flops"]["total"]
            lines.append(f"| {name} | {row['system']} | {flops} | {share:.1%} |")
    return "\n".join(lines)
