"""Before the model: what is announced for an image, and the question on its way to the model.

vLLM processes images on their own and caches them by a hash of image and options. The prompt joins the options, so
that an image is another item for every question.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import BatchFeature
from vllm.model_executor.models.idefics3 import Idefics3MultiModalProcessor, Idefics3ProcessingInfo
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdate

from modeling_qgsa import QGSAProcessor

from .selecting import LIMITS, budget_of, check_servable, count_positions, image_ids, prompt_about


PROMPT = "prompt_ids"  # among the options: the prompt of the request
OWN_FIELDS = ("prompt_ids", "limits")  # of an image, besides those of Idefics3


def stock_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are for the processor of the checkpoint."""
    return {name: value for name, value in options.items() if name not in (PROMPT, *LIMITS)}


class QGSAProcessingInfo(Idefics3ProcessingInfo):
    """Processor and configuration of the checkpoint, and the sizes of images."""

    def get_hf_processor(self, **kwargs) -> QGSAProcessor:
        return self.ctx.get_hf_processor(QGSAProcessor, **stock_options(kwargs))

    def ids_of_image(self, size, options: Mapping[str, Any]) -> list[int]:
        """The placeholders of an image, as ids, in a prompt that keeps everything."""
        processor, options = self.get_hf_processor(**options), stock_options(options)
        _, rows, columns = processor.image_processor.get_number_of_image_patches(size.height, size.width, options)
        return image_ids(processor, rows, columns)


class QGSAMultiModalProcessor(Idefics3MultiModalProcessor):
    """Announces the exact count of every image, and gives the model the prompt with it."""

    def apply(self, inputs, timing_ctx):
        check_servable(self.info.get_hf_config())
        options = {**inputs.hf_processor_mm_kwargs, PROMPT: tuple(inputs.prompt)}
        return super().apply(replace(inputs, hf_processor_mm_kwargs=options), timing_ctx)

    def _call_hf_processor(self, hf_data, hf_kwargs) -> BatchFeature:
        try:
            return super()._call_hf_processor(hf_data, stock_options(hf_kwargs))
        except ValueError as error:  # vLLM's names the data, that of our processor the rule
            raise (error.__cause__ if isinstance(error.__cause__, ValueError) else error) from None

    def _postprocess_hf_mm_data(self, mm_data, hf_processor_mm_kwargs, processed_data) -> BatchFeature:
        processed = super()._postprocess_hf_mm_data(mm_data, hf_processor_mm_kwargs, processed_data)
        if not mm_data:
            return processed
        config, options = self.info.get_hf_config(), hf_processor_mm_kwargs
        images = self.info.parse_mm_data({"image": mm_data["images"]}, validate=False)
        images = images.get_items("image", ImageProcessorItems)
        blocks = [self.info.ids_of_image(images.get_image_size(number), options) for number in range(len(images))]
        prompts = [prompt_about(options[PROMPT], block, config.image_token_id) for block in blocks]
        budgets = [vars(budget_of(config, options, block)) for block in blocks]
        processed["prompt_ids"] = [torch.tensor(each) for each in prompts]
        processed["limits"] = torch.tensor([[budget[name] for name in LIMITS] for budget in budgets])
        return processed

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs) -> Mapping[str, MultiModalFieldConfig]:
        own = {name: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for name in OWN_FIELDS}
        return {**super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs), **own}

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs) -> Sequence[PromptUpdate]:
        config = self.info.get_hf_config()

        def placeholders(number: int) -> list[int]:
            size = mm_items.get_items("image", ImageProcessorItems).get_image_size(number)
            block = self.info.ids_of_image(size, hf_processor_mm_kwargs)
            budget = budget_of(config, hf_processor_mm_kwargs, block)
            return [config.image_token_id] * count_positions(config, budget, block)

        return [PromptReplacement(modality="image", target=[config.image_token_id], replacement=placeholders)]
