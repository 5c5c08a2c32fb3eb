"""The vision encoder's own attention, which VisionZip and VisPruner prune by."""

import torch

from training.methods.method import MethodInputs, encode_all


def attention_received(given: MethodInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention that each token receives in the encoder's last but one layer, `(T, P)`, and its keys there,
    `(T, P, width)`; both are means over the token's patches.

    SigLIP has no class token whose attention could be read: the attention is the mean over all patches and heads.
    Every tile is encoded once, from pixels; `given.features` are those of this pass.
    """
    vision, scale = given.model.model.vision_model, given.model.config.scale_factor
    attention, queries, keys, received = vision.encoder.layers[-2].self_attn, [], [], []
    hooks = [
        projection.register_forward_hook(lambda module, args, output, into=into: into.append(output))
        for projection, into in ((attention.q_proj, queries), (attention.k_proj, keys))
    ]
    try:
        inputs = {name: value for name, value in given.inputs.items() if name != "image_hidden_states"}
        given.features = encode_all(given.model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    keys = torch.cat(keys)
    for query, key in zip(torch.cat(queries), keys):
        heads = (len(query), attention.num_heads, attention.head_dim)
        weights = query.view(heads).transpose(0, 1) @ key.view(heads).permute(1, 2, 0) * attention.scale
        received.append(weights.softmax(-1).mean((0, 1)))
    return mean_over_patches(torch.stack(received), scale), mean_over_patches(keys, scale)


def mean_over_patches(values: torch.Tensor, scale: int) -> torch.Tensor:
    """Means over the `scale` x `scale` patches of each token, `(T, P, ...)`, of `values` `(T, patches, ...)`."""
    side = round(values.shape[1] ** 0.5) // scale
    return values.unflatten(1, (side, scale, side, scale)).mean((2, 4)).flatten(1, 2)
