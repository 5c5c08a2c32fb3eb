"""transformers' common tests of models, on stock SmolVLM and on ours: what passes on stock passes on ours.

Exceptions, each with its reason at the test that stands in its place:

- test_model_outputs_equivalence, with a selection: upstream subtracts outputs, and a selection holds booleans.
- test_inputs_embeds and test_inputs_embeds_matches_input_ids, with a selection: embeddings beside images are refused,
  as layout and question are read from ids; the error names "dense", with which the second one runs.
- test_retain_grad_hidden_states_attentions, with a budget: hidden states are copies at the positions of the prompt.
- test_multimodal_outputs_are_returned, with a selection: features are in one tensor, a row per encoded tile.
- test_attention_outputs, with a budget: attention is that among the kept positions.

What is skipped is skipped on stock too, for the same reason: no accelerator, no flash attention, no such feature.
"""

import copy
import unittest
from unittest.mock import patch

import pytest
import torch
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES
from upstream_tests import load

from modeling_qgsa import QGSAConfig, QGSASmolVLMForConditionalGeneration, QGSASmolVLMModel
from modeling_qgsa.compat_qgsa import features_in
from modeling_qgsa.compat_qgsa import initialization as init
from modeling_qgsa.selector_qgsa import QuestionGuidedSelector


common = load("test_modeling_common")
generation = load("generation.test_utils")

TILES, GLOBAL, END, FAKE, NEWLINE, IMAGE, ASSISTANT = list(range(3, 39)), 39, 40, 41, 42, 43, 44
VISION = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "initializer_range": 0.02,
}
TEXT = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_theta": 10000.0,
    "attention_dropout": 0.0,
}


@pytest.fixture(autouse=True)
def trained(monkeypatch):
    """Selectors begin as if they had been trained: an untrained one is refused outside of training."""
    untrained = QuestionGuidedSelector.init_weights

    def init_weights(selector):
        untrained(selector)
        init.normal_(selector.cell_position, std=0.02)

    monkeypatch.setattr(QuestionGuidedSelector, "init_weights", init_weights)


class Tester:
    """Makes a tiny configuration and prompts: an image of 1 x 2 tiles with its markers, a question, a short answer."""

    __test__ = False
    is_training = True
    batch_size = 3
    vocab_size, hidden_size = TEXT["vocab_size"], TEXT["hidden_size"]
    num_hidden_layers, num_attention_heads = TEXT["num_hidden_layers"], TEXT["num_attention_heads"]
    tiles, tokens_per_tile, question, answer = 3, 4, 8, 2

    def __init__(self, config_class, **fields):
        self.config_class, self.fields = config_class, fields
        self.seq_length = len(self.image()) + self.question + 2 + self.answer
        self.encoder_seq_length = self.seq_length

    def image(self):
        tokens = [IMAGE] * self.tokens_per_tile
        rows = [FAKE, TILES[0], *tokens, FAKE, TILES[1], *tokens, NEWLINE, NEWLINE]
        return [*rows, FAKE, GLOBAL, *tokens, FAKE]

    def get_config(self):
        return self.config_class(
            image_token_id=IMAGE,
            scale_factor=2,
            tie_word_embeddings=False,
            use_cache=False,
            vision_config=dict(VISION),
            text_config=dict(TEXT),
            **self.fields,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        words = common.ids_tensor([self.batch_size, self.question + 2 + self.answer], 40) + 45
        words[:, self.question], words[:, self.question + 1] = END, ASSISTANT
        image = torch.tensor(self.image(), device=words.device).expand(self.batch_size, -1)
        input_ids = torch.cat([image, words], 1)
        inputs = {
            "pixel_values": common.floats_tensor([self.batch_size, self.tiles, 3, 16, 16]),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }
        return config, inputs


class StockTest(common.ModelTesterMixin, generation.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (SmolVLMModel, SmolVLMForConditionalGeneration)
    _is_composite = True
    skip_test_image_features_output_shape = True  # one row per tile
    test_can_init_all_missing_weights_before_2023 = True  # where no file names a year
    config_class: type = SmolVLMConfig
    fields: dict = {}

    def setUp(self):
        self.model_tester = Tester(self.config_class, **self.fields)


MARKERS = {
    "tile_token_ids": TILES,
    "global_image_token_id": GLOBAL,
    "end_of_utterance_token_id": END,
    "assistant_token_ids": [ASSISTANT],
    "selector_hidden_size": 32,
}


class DenseTest(StockTest):
    all_model_classes = (QGSASmolVLMModel, QGSASmolVLMForConditionalGeneration)
    config_class = QGSAConfig
    fields = MARKERS | {"selection": "dense"}

    def setUp(self):
        super().setUp()
        # The common tests look up in these tables which class is a base model, and which one takes labels.
        for table, name in (
            (MODEL_MAPPING_NAMES, "QGSASmolVLMModel"),
            (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "QGSASmolVLMForConditionalGeneration"),
        ):
            entry = patch.dict(table, {"qgsa_smolvlm": name})
            entry.start()
            self.addCleanup(entry.stop)


class WholeTest(DenseTest):
    """Everything is in the budget."""

    fields = MARKERS | {
        "selection": "before_encoder",
        "min_tiles": 2,
        "max_tiles": 2,
        "min_visual_tokens": 12,
        "max_visual_tokens": 12,
    }

    def test_model_outputs_equivalence(self):
        """Upstream subtracts every output from itself for its message, which booleans do not allow."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        asked = ({}, {"output_hidden_states": True}, {"output_attentions": True})
        for model_class in self.all_model_classes:
            model = model_class._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
            for options in asked:
                for with_labels in (False, True):
                    given = self._prepare_for_class(inputs, model_class, return_labels=with_labels)
                    with torch.no_grad():
                        as_tuple = model(**given, **options, return_dict=False)
                        as_dict = model(**given, **options, return_dict=True)
                    self.assert_alike(as_tuple, as_dict.to_tuple())

    def test_inputs_embeds(self):
        """Upstream leaves the ids out: a selection reads layout and question from them. Text alone needs none."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(copy.deepcopy(config)).eval()
            given = self._prepare_for_class(inputs, model_class)
            ids, text = given.pop("input_ids"), inputs["input_ids"][:, -self.model_tester.question :]
            embed = model.get_input_embeddings()
            with self.assertRaisesRegex(ValueError, 'from input_ids.*selection="dense"'):
                model(**given, inputs_embeds=embed(ids))
            with torch.no_grad():
                self.assertTrue(torch.equal(model(inputs_embeds=embed(text))[0], model(text)[0]))

    def test_inputs_embeds_matches_input_ids(self):
        """Upstream's, as the error in test_inputs_embeds proposes."""
        super().test_inputs_embeds_matches_input_ids(selection="dense")

    def test_multimodal_outputs_are_returned(self):
        """Upstream expects features by sample; ours are in one tensor, a row per encoded tile."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.all_model_classes[1](copy.deepcopy(config)).eval()
        with torch.no_grad():
            outputs = model(**inputs)
        encoded = self.model_tester.batch_size * (1 + config.max_tiles)  # the glance too
        shape = (encoded, self.model_tester.tokens_per_tile, self.model_tester.hidden_size)
        self.assertEqual(features_in(outputs).shape, shape)

    def assert_alike(self, one, two):
        if torch.is_tensor(one):
            self.assertTrue(torch.equal(one, two))
        elif isinstance(one, (list, tuple)):
            self.assertEqual(len(one), len(two))
            for each, other in zip(one, two):
                self.assert_alike(each, other)
        elif isinstance(one, dict):
            self.assert_alike(tuple(one.values()), tuple(two.values()))


class FewTest(WholeTest):
    """One tile of two and 5 visual tokens of 12."""

    fields = MARKERS | {
        "selection": "before_encoder",
        "min_tiles": 1,
        "max_tiles": 1,
        "min_visual_tokens": 5,
        "max_visual_tokens": 5,
    }

    def test_retain_grad_hidden_states_attentions(self):
        """Upstream asks for the gradient of a returned hidden state; ours are copies at the prompt's positions."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.all_model_classes[0]._from_config(copy.deepcopy(config), attn_implementation="eager")
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
        outputs.attentions[0].retain_grad()
        outputs.hidden_states[-1].flatten()[0].backward()
        self.assertIsNotNone(outputs.attentions[0].grad)
        self.assertTrue(torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state))

    def test_attention_outputs(self):
        """Upstream expects attention among all positions; ours is among those that were kept, and is causal."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
            given = self._prepare_for_class(inputs, model_class)
            with torch.no_grad():
                outputs = model(**given, output_attentions=True, output_hidden_states=True)
            real = outputs.selection.keep_indices >= 0  # rows of padding attend to anything
            kept = real.shape[1]
            self.assertLess(kept, self.model_tester.seq_length)
            self.assertEqual(len(outputs.attentions), self.model_tester.num_hidden_layers)
            for attention in outputs.attentions:
                shape = (self.model_tester.batch_size, self.model_tester.num_attention_heads, kept, kept)
                self.assertEqual(attention.shape, shape)
                self.assertFalse((attention * real[:, None, :, None]).triu(1).any())
            self.assertEqual(len(outputs.hidden_states), self.model_tester.num_hidden_layers + 1)
