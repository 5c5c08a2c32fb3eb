"""FLOPs of an answer by part: counted by torch, and by formula. A multiply-add is two.

    python training/flops.py HuggingFaceTB/SmolVLM-256M-Instruct HuggingFaceTB/SmolVLM-500M-Instruct

prints QGSA's own table, the cross-modal attention at k = 17, and beside it what the whole answer costs.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import AutoConfig

from modeling_qgsa.conversion_qgsa import config_of_dense


def _cpu_attention(query, key, value, *args, **kwargs):
    return sdpa_flop_count(query, key, value)


# torch's counter knows the CUDA kernels of attention only; without this it counts 0 for those of CPUs.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}


def vision_modules(model) -> list:
    """The modules whose FLOPs are those of vision: between them they hold all matrix products of the encoder."""
    vision = model.model.vision_model
    return [vision.embeddings.patch_embedding, vision.encoder, model.model.connector.modality_projection]


def count_flops(model, inputs: dict, max_new_tokens: int, make_options=dict, without=(), **options) -> dict[str, int]:
    """Count one greedy `model.generate(**inputs, **options)`: FLOPs of `vision`, `prefill`, `decode`, and `total`.

    Further options are those that `make_options()` returns; what it does to make them is counted too. Modules in
    `without` are not counted: the selector has no say where scores come from elsewhere, but runs all the same.

    Vision is the encoder and the connector; prefill is all else up to the first new token, the selector included;
    decode is the rest of the tokens.
    """
    vision, tokens, unused = [], [], []
    # In eval mode torch runs whole transformer layers as one kernel, of which the counter knows nothing.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:

        def before(module, args, kwargs):
            vision.append(-counter.get_total_flops())

        def after(module, args, output):
            vision.append(counter.get_total_flops())

        def before_unused(module, args):
            unused.append(-counter.get_total_flops())

        def after_unused(module, args, output):
            unused.append(counter.get_total_flops())

        hooks = [model.lm_head.register_forward_hook(lambda *_: tokens.append(counter.get_total_flops()))]
        for part in vision_modules(model):
            hooks += [part.register_forward_pre_hook(before, with_kwargs=True), part.register_forward_hook(after)]
        for part in without:
            hooks += [part.register_forward_pre_hook(before_unused), part.register_forward_hook(after_unused)]
        try:
            model.generate(**inputs, **options, **make_options(), do_sample=False, max_new_tokens=max_new_tokens)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for hook in hooks:
                hook.remove()
    total, first = counter.get_total_flops() - sum(unused), tokens[0] - sum(unused)
    return {"vision": sum(vision), "prefill": first - sum(vision), "decode": total - first, "total": total}


def vision_flops(config, sequences: list[int]) -> int:
    """Encoder and connector over sequences of so many patches each: whole tiles, or packed blocks.

    Args:
        config: a [`QGSAConfig`] or SmolVLM's own.
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
    """One pass of the text model over `new` tokens that attend to `seen` earlier ones and themselves, one logit row.

    Attention is counted as the kernels run it in the prefill: every token with every other one.
    """
    text = config.text_config
    head = text.head_dim or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    projections = 2 * new * text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    attention = 4 * new * (seen + new) * queries
    return text.num_hidden_layers * (projections + attention) + 2 * text.hidden_size * text.vocab_size


def selector_flops(config, question: int, tiles: int) -> int:
    """Selector and complexity estimator for one image: a question of `question` tokens, `tiles` with features."""
    width, hidden, cells = config.text_config.hidden_size, config.selector_hidden_size, config.tokens_per_tile
    read = min(question, config.max_question_tokens)
    length = cells + read
    layers = config.selector_layers * (24 * length * hidden**2 + 4 * length**2 * hidden)
    ends = 2 * length * hidden * (width + 1)  # into its width, and out to relevances and weights of words
    match = 4 * tiles * width * hidden * (1 + cells)
    estimator = 2 * hidden * (2 * width + config.complexity_levels)
    return layers + ends + match + estimator


def estimate_flops(
    config, tiles: int, prompt: int, new_tokens: int, question: int | None = None, blocks: tuple[int, ...] = ()
) -> dict[str, int]:
    """FLOPs of one answer about one image by formula, in the parts of `count_flops`.

    Args:
        tiles: whole tiles encoded, the global view included.
        prompt: tokens of the prompt that the text model reads, kept visual tokens included.
        new_tokens: tokens of the answer.
        question: tokens of the question, which the selector reads; None for a model that does not select.
        blocks: of each tile that is encoded in part, how many blocks.
    """
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    sequences = [patches] * tiles + [sum(blocks) * config.scale_factor**2] * bool(blocks)
    vision = vision_flops(config, sequences)
    prefill = text_flops(config, prompt)
    if question is not None:
        prefill += selector_flops(config, question, tiles + len(blocks))
    decode = sum(text_flops(config, 1, prompt + step) for step in range(new_tokens - 1))
    return {"vision": vision, "prefill": prefill, "decode": decode, "total": vision + prefill + decode}


def cross_modal_attention(config, question: int, tokens: int) -> int:
    """FLOPs of the attention of `question` words to `tokens` visual tokens, in all layers of the text model."""
    text = config.text_config
    head = text.head_dim or text.hidden_size // text.num_attention_heads
    return text.num_hidden_layers * 4 * question * tokens * text.num_attention_heads * head


def paper_table(kept: int = 17, patch: int = 16) -> list[dict]:
    """QGSA's own measure: cross-modal attention, in which every word of the question attends to every patch.

    A row for each image size of the paper: `pixels` of a side, `patches`, `saved` (share of the FLOPs) and `times`
    (fewer) when `kept` patches are left. The number of words and the width cancel out.
    """
    rows = []
    for pixels in (224, 336, 384, 448, 576):
        patches = (pixels // patch) ** 2
        rows.append({"pixels": pixels, "patches": patches, "saved": 1 - kept / patches, "times": patches / kept})
    return rows


def answer_table(config, question: int = 20, words: int = 43, new_tokens: int = 8, kept: int = 17) -> list[dict]:
    """What an answer about an image of 4 x 4 tiles costs by formula: dense, and `kept` tokens chosen in three ways.

    Args:
        question: tokens of the question.
        words: tokens of the prompt that are neither visual nor markers of high-resolution tiles.
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
    """The paper's table, and those of the architectures in `configs`, as Markdown."""
    lines = ["| image, px | patches | cross-modal attention saved at k = 17 | times fewer |", "|---|---|---|---|"]
    for row in paper_table():
        lines.append(f"| {row['pixels']} | {row['patches']} | {row['saved']:.1%} | {row['times']:.0f} |")
    lines += [
        "",
        "| architecture | system | cross-modal attention, GFLOPs | encoder | prefill | decode | total | of dense |",
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="folders or Hub ids with a config.json of SmolVLM")
    parser.add_argument("--output", help="JSON file to write, such as hub_cards/results/flops.json")
    run = parser.parse_args()
    configs = {Path(name).name: config_of_dense(AutoConfig.from_pretrained(name)) for name in run.files}
    if run.output:
        tables = {"paper": paper_table(), "answers": {name: answer_table(config) for name, config in configs.items()}}
        Path(run.output).write_text(json.dumps(tables, indent=2) + "\n")
    print(format_tables(configs))


if __name__ == "__main__":
    main()
