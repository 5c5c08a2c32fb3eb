"""Vision features of training images, encoded once: the encoder is frozen and takes nine tenths of a step."""

import hashlib
from pathlib import Path

import torch

from modeling_qgsa.layout_qgsa import VisualLayout
from modeling_qgsa.request_qgsa import VisualInputs
from modeling_qgsa.vision_qgsa import encode_tiles
from training.learning.store import TensorStore, digest


def open_feature_cache(folder: str | Path, model, processor, max_bytes: int) -> TensorStore:
    """Open a store for the vision features of `model` on images prepared by `processor`.

    Raises ValueError if the folder was made with other weights, another dtype or another image processor.
    """
    encoder = [*model.model.vision_model.state_dict().values(), *model.model.connector.state_dict().values()]
    maker = {
        "encoder": digest(*encoder),
        "dtype": str(encoder[0].dtype),
        "image processor": hashlib.sha256(processor.image_processor.to_json_string().encode()).hexdigest(),
    }
    if model.config.glance_downscale > 1:
        maker["glance downscale"] = str(model.config.glance_downscale)
    return TensorStore(folder, maker, max_bytes)


@torch.no_grad()
def with_features(store: TensorStore, model, inputs: dict) -> dict:
    """`inputs` with the pixels replaced by the features of all tiles, `image_hidden_states` `(T, P, D)`.

    The pixels of a sample are the key of its features. Missing samples are encoded in one batch and stored.
    """
    layout = VisualLayout.of(model.config, inputs["input_ids"])
    counts = torch.bincount(layout.tile_sample, minlength=len(inputs["input_ids"])).tolist()
    pixels = [inputs[name] for name in ("pixel_values", "pixel_attention_mask") if inputs.get(name) is not None]
    keys = [digest(*(part[sample, :count] for part in pixels)) for sample, count in enumerate(counts)]
    found = [store.get(key) for key in keys]
    new = [sample for sample, features in enumerate(found) if features is None]
    if new:
        visual = VisualInputs(inputs["pixel_values"], inputs.get("pixel_attention_mask"))
        tiles = torch.isin(layout.tile_sample, torch.tensor(new, device=layout.tile_sample.device))
        encoded = encode_tiles(model.model, visual, layout, tiles).split([counts[sample] for sample in new])
        for sample, features in zip(new, encoded):
            found[sample] = features
            store.put(keys[sample], features)
    features = torch.cat([part.to(layout.tile_sample.device) for part in found])
    rest = {name: value for name, value in inputs.items() if name not in ("pixel_values", "pixel_attention_mask")}
    return {**rest, "image_hidden_states": features}
