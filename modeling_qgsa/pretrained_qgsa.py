"""What both models share: initial weights, loading of former weight names, and activation checkpointing."""

from functools import partial

from torch.utils.checkpoint import checkpoint
from transformers import SmolVLMPreTrainedModel
from transformers.utils import logging

from .compat_qgsa import is_checkpointing
from .configuration_qgsa import QGSAConfig
from .crossing_qgsa import VisionBlock
from .selector_qgsa import FORMER_NAMES, QuestionGuidedSelector


logger = logging.get_logger(__name__)


class QGSAPreTrainedModel(SmolVLMPreTrainedModel):
    """Base class of the models with and without a language head."""

    config: QGSAConfig
    config_class = QGSAConfig
    _checkpoint_conversion_mapping = FORMER_NAMES  # where PEFT looks for it

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, QuestionGuidedSelector | VisionBlock):
            module.init_weights()

    @classmethod
    def from_pretrained(cls, *args, key_mapping: dict[str, str] | None = None, **kwargs):
        """As in transformers; also loads the weight names of version 0.2. `key_mapping` renames further weights."""
        return super().from_pretrained(*args, key_mapping=FORMER_NAMES | (key_mapping or {}), **kwargs)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """As stock's, without its deprecation warning: PEFT reads it of every model that it wraps."""
        return is_checkpointing(self)

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs
    ):
        # In training the gates reach the layers inside the attention mask, a keyword argument: reentrant checkpointing
        # differentiates positional arguments only, and would run through the graph of the gates once per layer.
        if enable and isinstance(gradient_checkpointing_func, partial):
            if gradient_checkpointing_func.keywords.get("use_reentrant"):
                logger.warning_once(
                    "use_reentrant (True): reentrant checkpointing cannot train the selector, whose gates are part of "
                    "the attention mask. Checkpointing is non-reentrant instead."
                )
        not_reentrant = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, not_reentrant, **kwargs)
