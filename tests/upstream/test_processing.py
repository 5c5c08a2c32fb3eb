"""transformers' common tests of processors, on stock's and on ours: what passes on stock passes on ours.

Exceptions: stock fails test_call_arguments_not_in_attributes, which ours passes; the error for mismatching numbers of
images is worded differently; the tests of a saved processor run without its code, see `OwnTest`.
"""

import unittest
from unittest.mock import patch

from transformers import Idefics3Processor
from upstream_tests import load

from modeling_qgsa import QGSAProcessor
from training.standins.tiny import build_processor


common = load("test_processing_common")


class StockTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class: type = Idefics3Processor
    # Every image becomes 17 tiles of 16 tokens, or 5 in one row.
    images_text_kwargs_max_length = images_text_kwargs_override_max_length = images_unstructured_max_length = 400

    @classmethod
    def _setup_from_components(cls):
        stock = build_processor()
        parts = {"image_seq_len": stock.image_seq_len, "chat_template": stock.chat_template}
        return cls.processor_class(stock.image_processor, stock.tokenizer, **parts)

    @staticmethod
    def prepare_processor_dict():
        return {"image_seq_len": 16}

    def test_call_arguments_not_in_attributes(self):
        if self.processor_class is Idefics3Processor:
            self.skipTest("stock's __call__ takes image_seq_len, which is an attribute too")
        super().test_call_arguments_not_in_attributes()


class OwnTest(StockTest):
    processor_class = QGSAProcessor

    @staticmethod
    def does_processor_return_mm_offsets(processor_class, method_name):
        """Upstream compares with the parent class, which is stock's processor here."""
        return StockTest.does_processor_return_mm_offsets(Idefics3Processor, method_name)

    def test_if_input_has_mismatching_tokens_and_mm_data(self):
        """Upstream expects stock's words; ours names the numbers of all prompts."""
        processor = self.get_processor()
        text = self.prepare_text_inputs(batch_size=3, modalities=["image"])
        for count in (2, 4):
            images = [[image] for image in self.prepare_images_inputs(batch_size=count)]
            with self.assertRaisesRegex(ValueError, r"the prompts name \[1, 1, 1\] images, but \[1, 1.* are given"):
                processor(text=text, images=images, return_tensors="pt", padding=True)

    # The common tests compare a processor that was saved with one that was loaded. Saving it with its code adds an
    # auto_map and loading does not; `tests/modeling_qgsa/test_remote_code.py` tests that.

    @patch.object(QGSAProcessor, "_auto_class", None)
    def test_processor_from_and_save_pretrained(self):
        super().test_processor_from_and_save_pretrained()

    @patch.object(QGSAProcessor, "_auto_class", None)
    def test_processor_from_and_save_pretrained_as_nested_dict(self):
        super().test_processor_from_and_save_pretrained_as_nested_dict()
