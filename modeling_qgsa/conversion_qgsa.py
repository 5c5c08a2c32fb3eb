"""From a dense SmolVLM to QGSA: accepted checkpoints, their configuration and their weights."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

from .configuration_qgsa import QGSAConfig
from .prompt_qgsa import read_chat_format, read_tile_markers, tokenizer_of


OWN_WEIGHTS = ("model.selector.", "model.complexity_estimator.", "model.vision_blocks.")


def load_dense(base, tokenizer=None):
    """The dense model and its tokenizer.

    Args:
        base: Hub id, folder or model.
        tokenizer: tokenizer or processor that replaces the one of an id or folder; returned unchanged for a model.

    Raises ValueError for a checkpoint of another architecture, naming it, before any weight is loaded.
    """
    if isinstance(base, PreTrainedModel):
        check_architecture(base.config)
        return base, tokenizer
    check_architecture(AutoConfig.from_pretrained(base))
    return AutoModelForImageTextToText.from_pretrained(base), tokenizer or AutoTokenizer.from_pretrained(base)


def config_of_dense(dense, tokenizer=None, **fields) -> QGSAConfig:
    """The configuration of a QGSA model: sizes from the dense one, marker ids from `tokenizer`, and `fields`.

    The pointer is the text model's attention. The tiles that it chooses are kept whole, unless `fields` say how many
    visual tokens to keep, and the markers of the others stay: the text model was not trained to read less.

    Args:
        tokenizer: tokenizer or processor; None leaves the marker ids to `fields` and the defaults.
    """
    if tokenizer is not None:
        fields = marker_ids(tokenizer) | fields
    vision = dense.vision_config.to_dict()
    del vision["model_type"]
    config = QGSAConfig(
        text_config=dense.text_config.to_dict(),
        vision_config=vision,
        scale_factor=dense.scale_factor,
        tie_word_embeddings=dense.tie_word_embeddings,
        **({"image_token_id": dense.image_token_id, "pointer": "attention"} | fields),
    )
    if config.pointer == "attention" and "keep_tile_markers" not in fields:
        config.keep_tile_markers = True
    if config.pointer == "attention" and not {"min_visual_tokens", "max_visual_tokens"} & fields.keys():
        config.keep_whole_tiles()
    return config


def copy_dense_weights(dense, model):
    """Copy every weight of `dense` to `model`. Raises ValueError if weights are missing or have no counterpart."""
    missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    missing = [name for name in missing if not name.startswith(OWN_WEIGHTS)]
    if missing or unexpected:
        raise ValueError(
            f"{type(dense).__name__} has {len(dense.state_dict())} weights: {len(unexpected)} have no counterpart "
            f"({unexpected[:3]}), and {len(missing)} are missing ({missing[:3]})"
        )


def check_architecture(config):
    """Raise ValueError unless the configuration is that of an idefics3 or smolvlm checkpoint."""
    if config.model_type not in ("idefics3", "smolvlm"):
        raise ValueError(f"model_type ({config.model_type!r}): from_dense takes idefics3 and smolvlm checkpoints")


def marker_ids(source) -> dict:
    """Ids of the tokens by which images and turns are found, as fields of [`QGSAConfig`].

    Args:
        source: tokenizer or processor; the turns are those of its chat template, see `read_chat_format`.

    Raises ValueError if the tokenizer lacks a token of SmolVLM's images.
    """
    names = ["<image>", "<fake_token_around_image>"]
    known = tokenizer_of(source).get_vocab()
    lacking = [name for name in names if name not in known]
    if lacking:
        raise ValueError(f"the tokenizer lacks {len(lacking)} of the {len(names)} tokens of an image: {lacking}")
    global_view, *tiles = read_tile_markers(source)
    chat = read_chat_format(source)
    return {
        "image_token_id": known["<image>"],
        "global_image_token_id": global_view,
        "end_of_utterance_token_id": chat.end_of_utterance_token_id,
        "assistant_token_ids": chat.assistant_token_ids,
        "user_token_ids": chat.user_token_ids,
        "tile_token_ids": tiles,
    }
