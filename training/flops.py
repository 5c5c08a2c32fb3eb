"""FLOPs of an answer by part, counted by torch; a multiply-add is two."""

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _cpu_attention(query, key, value, *args, **kwargs):
    return sdpa_flop_count(query, key, value)


# torch's counter knows the CUDA kernels of attention only; without this it counts 0 for those of CPUs.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}


def count_flops(model, inputs: dict, max_new_tokens: int, **options) -> dict[str, int]:
    """Count one greedy `model.generate(**inputs, **options)`: FLOPs of `vision`, `prefill`, `decode`, and `total`.

    Vision is the encoder and the connector; prefill is all else up to the first new token, the selector included;
    decode is the rest of the tokens.
    """
    vision, tokens = [], []
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:

        def before(module, args):
            vision.append(-counter.get_total_flops())

        def after(module, args, output):
            vision.append(counter.get_total_flops())

        hooks = [model.lm_head.register_forward_hook(lambda *_: tokens.append(counter.get_total_flops()))]
        for part in (model.model.vision_model, model.model.connector):
            hooks += [part.register_forward_pre_hook(before), part.register_forward_hook(after)]
        try:
            model.generate(**inputs, **options, do_sample=False, max_new_tokens=max_new_tokens)
        finally:
            for hook in hooks:
                hook.remove()
    total, first = counter.get_total_flops(), tokens[0]
    return {"vision": sum(vision), "prefill": first - sum(vision), "decode": total - first, "total": total}
