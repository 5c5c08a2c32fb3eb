import json
import re

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

import modeling_qgsa
from modeling_qgsa import QGSAConfig, configuration_qgsa, processing_qgsa
from modeling_qgsa import modeling_qgsa as modeling
from modeling_qgsa.configuration_qgsa import Budget


@pytest.fixture
def config(model):
    return QGSAConfig.from_dict(model.config.to_dict())


def test_auto_map_names_classes_that_exist(config):
    files = {
        "configuration_qgsa": configuration_qgsa,
        "modeling_qgsa": modeling,
        "processing_qgsa": processing_qgsa,
    }
    assert set(config.auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForVision2Seq",
        "AutoModelForMultimodalLM",
        "AutoProcessor",
    }
    for reference in config.auto_map.values():
        file, name = reference.split(".")
        assert hasattr(files[file], name)


def test_vision2seq_is_the_class_of_this_transformers():
    old = transformers.__version__.startswith("4.")
    name = "AutoModelForVision2Seq" if old else "AutoModelForImageTextToText"
    assert modeling_qgsa.AutoModelForVision2Seq is getattr(transformers, name)


def test_round_trip_keeps_every_field(tmp_path, model):
    fields = {"selection": "after_encoder", "min_tiles": 1, "max_tiles": 7, "gumbel_temperature": 0.5}
    config = QGSAConfig.from_dict(model.config.to_dict() | fields)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "qgsa_smolvlm"
    assert saved["auto_map"] == configuration_qgsa.AUTO_MAP
    loaded = QGSAConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert {name: getattr(loaded, name) for name in fields} == fields


def test_tokens_per_tile_follows_the_vision_config(config):
    assert config.tokens_per_tile == 16
    config.scale_factor = 4
    assert config.tokens_per_tile == 4


def test_default_markers_are_those_of_the_published_tokenizer():
    config = QGSAConfig(text_config={"model_type": "llama"}, vision_config={})
    assert (config.global_image_token_id, config.image_token_id, config.end_of_utterance_token_id) == (
        49152,
        49190,
        49279,
    )
    assert config.tile_token_ids == list(range(49153, 49189))
    assert config.assistant_token_ids == [9519, 9531, 42]  # "Assistant:"


def test_a_checkpoint_saved_without_the_assistants_ids_loads(model):
    saved = model.config.to_dict()
    assert saved.pop("assistant_token_ids") != QGSAConfig().assistant_token_ids
    assert QGSAConfig.from_dict(saved).assistant_token_ids == QGSAConfig().assistant_token_ids


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"selection": "everything"},
            "selection ('everything'): choose from before_encoder, after_encoder, blocks, dense",
        ),
        (
            {"min_visual_tokens": 65, "max_visual_tokens": 64},
            "min_visual_tokens (65) must not exceed max_visual_tokens (64)",
        ),
        ({"min_tiles": 5, "max_tiles": 4}, "min_tiles (5) must not exceed max_tiles (4)"),
        ({"min_visual_tokens": 0}, "min_visual_tokens (0) must be at least 1"),
        ({"min_tiles": -1}, "min_tiles (-1) must be at least 0"),
        ({"max_tiles": -1}, "min_tiles (0) must not exceed max_tiles (-1)"),
        ({"max_tiles": "4"}, "max_tiles"),
        (
            {"selector_hidden_size": 30, "selector_heads": 4},
            "selector_hidden_size (30) must be a multiple of selector_heads (4)",
        ),
        ({"selector_layers": 0}, "selector_layers (0)"),
        ({"max_question_tokens": 0}, "max_question_tokens (0)"),
        ({"gumbel_temperature": 0.0}, "gumbel_temperature (0.0)"),
        ({"complexity_levels": 1}, "complexity_levels (1) must be at least 2"),
        ({"complexity_quantile": 0}, "complexity_quantile (0) must be in (0, 1]"),
        ({"complexity_quantile": 1.5}, "complexity_quantile (1.5)"),
        ({"assistant_token_ids": []}, "assistant_token_ids (0 ids) must hold at least 1"),
        ({"assistant_token_ids": [3, -1]}, "assistant_token_ids (-1) must be in 0 .. 2147483647"),
        ({"assistant_token_ids": "Assistant:"}, "assistant_token_ids"),
        ({"tile_token_ids": [1, 2, 3]}, "tile_token_ids (3 ids) must hold 36: 6 rows of 6 columns"),
    ],
)
def test_a_field_out_of_its_range_is_named(model, fields, message):
    with pytest.raises(StrictDataclassError, match=re.escape(message)):
        QGSAConfig.from_dict(model.config.to_dict() | fields)


def test_overrides_replace_what_is_configured_and_none_does_not(config):
    budget = Budget.of(config, selection="after_encoder", max_tiles=None, max_visual_tokens=20)
    assert budget == Budget("after_encoder", config.min_visual_tokens, 20, config.min_tiles, config.max_tiles)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"selection": "all"}, "selection ('all')"),
        ({"min_tiles": 9}, "min_tiles (9) must not exceed max_tiles (4)"),
        ({"max_visual_tokens": 7}, "min_visual_tokens (8) must not exceed max_visual_tokens (7)"),
        ({"min_visual_tokens": -3}, "min_visual_tokens (-3)"),
        ({"positions_per_image": 0}, "positions_per_image (0) must be an integer of at least 1"),
        ({"positions_per_image": 9.0}, "positions_per_image (9.0) must be an integer"),
        ({"positions_per_image": 64, "max_visual_tokens": 9}, "positions_per_image (64): max_visual_tokens must not"),
    ],
)
def test_an_override_out_of_range_is_named(config, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Budget.of(config, **overrides)


@pytest.mark.parametrize(
    "number, overrides, expected",
    [
        (48, {}, (8, 48, 0, 4)),  # as configured
        (36, {}, (8, 36, 0, 3)),
        (37, {}, (8, 37, 0, 4)),
        (5, {}, (5, 5, 0, 1)),
        (1, {"min_tiles": 1}, (1, 1, 1, 1)),
        (272, {}, (8, 272, 0, 23)),  # more than is configured
        (40, {"max_tiles": 9, "min_visual_tokens": 40}, (40, 40, 0, 9)),
        (40, {"max_tiles": 0, "max_visual_tokens": None}, (8, 40, 0, 0)),
        (2**31 - 1, {}, (8, 2**31 - 1, 0, 178_956_971)),
    ],
)
def test_one_number_limits_tokens_and_tiles(number, overrides, expected, config):
    assert vars(Budget.of(config)) == vars(Budget("before_encoder", 8, 48, 0, 4))
    assert Budget.of(config, number, **overrides) == Budget("before_encoder", *expected)


@pytest.mark.parametrize("number, tiles", [(1, 0), (16, 0), (17, 1), (32, 1), (33, 2), (272, 16)])
def test_tiles_and_global_view_can_deliver_so_many_tokens(number, tiles, config):
    config.max_tiles = 0
    assert Budget.of(config, number).max_tiles == tiles


def test_one_number_of_whole_tiles_is_the_budget_of_whole_tiles(config):
    config.keep_whole_tiles()
    assert config.max_visual_tokens == 80 and Budget.of(config, 80) == Budget.of(config)
    config.max_tiles, config.max_visual_tokens = 2**31 - 1, 1
    config.min_visual_tokens = 1
    assert Budget.of(config, 3).max_tiles == 2**31 - 1


def test_one_number_lowers_the_configured_minima(config):
    config.min_visual_tokens, config.min_tiles = 48, 4
    assert Budget.of(config, 20) == Budget("before_encoder", 20, 20, 2, 2)


@pytest.mark.parametrize(
    "number, overrides, message",
    [
        (0, {}, "max_image_tokens (0) must be an integer of 1 to 2147483647"),
        (2**31, {}, "max_image_tokens (2147483648) must be an integer of 1 to 2147483647"),
        (True, {}, "max_image_tokens (True) must be an integer"),
        (9.5, {}, "max_image_tokens (9.5) must be an integer"),
        ("9", {}, "max_image_tokens ('9') must be an integer"),
        (40, {"max_visual_tokens": 40}, "max_image_tokens (40, at most 4 tiles) contradicts max_visual_tokens (40)"),
        (40, {"min_visual_tokens": 41}, "max_image_tokens (40, at most 4 tiles) contradicts min_visual_tokens (41)"),
        (40, {"min_tiles": 5}, "max_image_tokens (40, at most 4 tiles) contradicts min_tiles (5)"),
        (40, {"min_tiles": 2, "max_tiles": 1}, "min_tiles (2) must not exceed max_tiles (1)"),
        (40, {"min_tiles": "2"}, "min_tiles ('2') must be an integer"),
        (40, {"selection": "dense"}, 'max_image_tokens (40): not available with selection "dense"'),
    ],
)
def test_one_number_out_of_range_or_against_others_is_named(number, overrides, message, config):
    with pytest.raises(ValueError, match=re.escape(message)):
        Budget.of(config, number, **overrides)


def test_a_call_that_limits_visual_tokens_has_no_exact_count(config):
    config.positions_per_image = 64
    assert Budget.of(config).positions_per_image == Budget.of(config, max_tiles=2).positions_per_image == 64
    assert Budget.of(config, positions_per_image=48).positions_per_image == 48
    assert Budget.of(config, min_visual_tokens=16).positions_per_image is None
    assert Budget.of(config, 32).positions_per_image is None
    with pytest.raises(ValueError, match=r"positions_per_image \(48\): max_image_tokens must not be given too"):
        Budget.of(config, 32, positions_per_image=48)


@pytest.mark.parametrize("pointer", ["selector", "attention"])
def test_a_call_gets_no_larger_count_than_is_configured(pointer, config):
    config.positions_per_image, config.pointer = 64, pointer
    with pytest.raises(ValueError, match=r"positions_per_image \(65\): this checkpoint is configured for at most 64"):
        Budget.of(config, positions_per_image=65)
    config.positions_per_image = None
    assert Budget.of(config, positions_per_image=65).positions_per_image == 65


def test_a_field_that_was_set_out_of_range_is_found_at_the_next_call(config):
    config.max_tiles = -2
    with pytest.raises(ValueError, match=re.escape("min_tiles (0) must not exceed max_tiles (-2)")):
        Budget.of(config)


def test_complexity_moves_the_budget_from_the_minimum_to_the_maximum():
    budget = Budget("before_encoder", min_visual_tokens=8, max_visual_tokens=40, min_tiles=1, max_tiles=5)
    m, k = budget.resolve(torch.tensor([0.0, 0.25, 1.0]))
    assert m.tolist() == [1, 2, 5] and k.tolist() == [8, 16, 40]
    assert m.dtype == k.dtype == torch.int64


def test_a_saved_configuration_names_the_version_that_wrote_it(tmp_path, model):
    model.config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    assert saved["qgsa_version"] == modeling_qgsa.__version__
    path.write_text(json.dumps(saved | {"qgsa_version": "0.0.1"}))
    assert QGSAConfig.from_pretrained(tmp_path).to_dict()["qgsa_version"] == modeling_qgsa.__version__
    del saved["qgsa_version"]  # as every checkpoint before 0.2 was saved
    path.write_text(json.dumps(saved))
    assert QGSAConfig.from_pretrained(tmp_path).to_dict() == QGSAConfig.from_dict(saved).to_dict()
