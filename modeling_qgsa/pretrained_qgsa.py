"""What both models share: initial weights, and loading of former weight names."""

from transformers import SmolVLMPreTrainedModel

from .configuration_qgsa import QGSAConfig
from .selector_qgsa import FORMER_NAMES, QuestionGuidedSelector


class QGSAPreTrainedModel(SmolVLMPreTrainedModel):
    """Base class of the models with and without a language head."""

    config: QGSAConfig
    config_class = QGSAConfig
    _checkpoint_conversion_mapping = FORMER_NAMES  # where PEFT looks for it

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, QuestionGuidedSelector):
            module.init_weights()

    @classmethod
    def from_pretrained(cls, *args, key_mapping: dict[str, str] | None = None, **kwargs):
        """As in transformers; also loads the weight names of version 0.2. `key_mapping` renames further weights."""
        return super().from_pretrained(*args, key_mapping=FORMER_NAMES | (key_mapping or {}), **kwargs)
