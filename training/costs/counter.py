"""FLOPs of one answer, counted by torch while the model generates it. A multiply-add counts as two."""

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from modeling_qgsa import GuidedVLM


def _attention(query, key, value, *args, **kwargs):
    key, value = ((*shape[:1], query[1], *shape[2:]) for shape in (key, value))  # grouped queries share their heads
    return sdpa_flop_count(query, key, value)


# torch's counter does not know the kernel of CPUs, which would count as 0 FLOPs, and refuses grouped queries on CUDA.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention: _attention,
    torch.ops.aten._scaled_dot_product_efficient_attention: _attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention: _attention,
}


def vision_modules(model) -> list[torch.nn.Module]:
    """Modules that make up vision: together they contain every matrix product of encoder and connector."""
    if isinstance(model, GuidedVLM):
        return vision_modules(model.guide) + vision_modules(model.target)
    vision = model.model.vision_model
    return [vision.embeddings.patch_embedding, vision.encoder, model.model.connector.modality_projection]


def count_flops(model, inputs: dict, max_new_tokens: int, make_options=dict, without=(), **options) -> dict[str, int]:
    """Count the FLOPs of one greedy `model.generate(**inputs, **options)`.

    Args:
        model: a stock Idefics3 or SmolVLM model, a QGSA model, or a pair of them.
        inputs: processor output, batch size B.
        max_new_tokens: number of tokens to generate.
        make_options: called without arguments; returns further options of `generate`. The FLOPs it spends on making
            them are counted as well.
        without: modules excluded from the count, such as a selector that runs but does not influence the selection
            because the scores come from elsewhere.
        options: options of `generate`.

    Returns:
        FLOPs of the whole batch as `{"vision", "prefill", "decode", "total"}`. Vision is the encoder and the
        connector; prefill is everything else up to the first new token, including the selector; decode is the
        remaining tokens. Of a pair, prefill holds all that the guide's text model does, and vision both encoders.
    """
    vision, tokens, unused = [], [], []
    # In eval mode torch runs whole transformer layers as one fused kernel, which the counter does not know.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:

        def before(module, args, kwargs):
            vision.append(-counter.get_total_flops())

        def after(module, args, output):
            vision.append(counter.get_total_flops())

        def before_unused(module, args):
            unused.append(-counter.get_total_flops())

        def after_unused(module, args, output):
            unused.append(counter.get_total_flops())

        answering = model.target if isinstance(model, GuidedVLM) else model
        hooks = [answering.lm_head.register_forward_hook(lambda *_: tokens.append(counter.get_total_flops()))]
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
    total = counter.get_total_flops() - sum(unused)
    first = tokens[0] - sum(unused) if tokens else total  # the guide of a pair may answer alone
    return {"vision": sum(vision), "prefill": first - sum(vision), "decode": total - first, "total": total}
