"""Graphs for ONNX Runtime: the published layout, and the outputs of torch at other sizes than those traced."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import export
import numpy as np
import pytest
import torch

from modeling_qgsa import QGSASmolVLMForConditionalGeneration
from modeling_qgsa.attention_qgsa import attention_of_rows
from modeling_qgsa.vision_qgsa import blocks_of_tiles, encode_blocks, encode_scaled_down, patch_numbers


onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[onnx]'")
onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install -e '.[onnx]'")
export_onnx = pytest.importorskip("export_onnx")


ROOT = Path(__file__).parents[2]
TINY = ROOT / "hub_cards" / "tiny-qgsa"
DENSE = ROOT / "hub_cards" / "tiny-dense"


@pytest.fixture(scope="module")
def exported(make_model, tmp_path_factory):
    """Makes the graphs of a random model with its pointer: the model and a function that runs a graph."""

    def make(pointer):
        folder, model = tmp_path_factory.mktemp("graphs") / "onnx", make_model(pointer=pointer, glance_downscale=2)
        export_onnx.export_graphs(model, folder, ["fp32"])

        def run(name, **feeds):
            session = onnxruntime.InferenceSession(folder / f"{name}.onnx")
            return session.run(None, {key: np.asarray(value) for key, value in feeds.items()})

        return model, run

    return {pointer: make(pointer) for pointer in ("attention", "selector")}


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tiles", [1, 3])
def test_the_encoder_leaves_padding_out(tiles, exported, batch):
    model, run = exported["attention"]
    pixels, mask = (batch[name][:, :tiles].clone() for name in ("pixel_values", "pixel_attention_mask"))
    mask = mask.bool()
    mask[1, -1], pixels[1, -1] = False, 0.0
    (features,) = run("vision_encoder", pixel_values=pixels, pixel_attention_mask=mask)
    assert features.shape == (3 * tiles - 1, 16, 32)
    with torch.no_grad():
        expected = model.model.get_image_features(pixels, mask, return_dict=True).pooler_output
    assert_close(features.reshape(-1, 32), torch.cat(list(expected)))


@pytest.mark.parametrize("name, fused", [("vision_encoder", 2), ("glance_encoder", 2), ("block_encoder", 0)])
def test_attention_without_a_mask_is_one_node_per_layer(name, fused, make_model, tmp_path):
    export_onnx.export_graphs(make_model(glance_downscale=2), tmp_path / "onnx", ["fp32", "fp16"])
    for file in (f"{name}.onnx", f"{name}_fp16.onnx"):
        kinds = [node.op_type for node in onnx.load(tmp_path / "onnx" / file).graph.node]
        assert (kinds.count("MultiHeadAttention"), kinds.count("Softmax")) == (fused, 2 - fused)
        assert kinds.count("Gelu") == 2


@torch.no_grad()
@pytest.mark.parametrize("counts", [(1,), (16,), (5, 1), (0, 16, 3)])
def test_the_block_graph_encodes_any_number_of_blocks_of_any_tiles(counts, exported, batch):
    model, run = exported["attention"]
    pixels = batch["pixel_values"][0, : len(counts)]
    chosen = torch.rand(len(counts), 16).argsort(1).argsort(1) < torch.tensor(counts)[:, None]
    tile, block = chosen.nonzero(as_tuple=True)
    feeds = {"pixel_blocks": blocks_of_tiles(pixels, 4)[tile, block], "tile_numbers": 3 * tile}
    (features,) = run("block_encoder", **feeds, patch_numbers=patch_numbers(4, 2, None)[block])
    base, image = model.model, torch.zeros(len(counts), dtype=torch.long)
    assert_close(features, encode_blocks(base.vision_model, base.connector, pixels, chosen, image, 2))


@torch.no_grad()
@pytest.mark.parametrize("images", [1, 3])
def test_the_glance_graph_sees_a_smaller_view(images, exported, batch):
    model, run = exported["attention"]
    pixels = batch["pixel_values"][0, :images]
    (features,) = run("glance_encoder", pixel_values=pixels)
    assert features.shape == (images, 16, 32)
    assert_close(features, encode_scaled_down(model.model, pixels, None))


@torch.no_grad()
def test_the_decoder_reads_padding_positions_and_a_cache_that_may_be_empty(exported):
    model, run = exported["attention"]
    ids = torch.randint(3, 400, (3, 9))
    mask, positions = torch.ones_like(ids), torch.tensor([0, 1, 2, 5, 6, 9, 10, 11, 12]).expand(3, -1)  # with gaps
    mask[1, :4] = 0
    (embeds,) = run("embed_tokens", input_ids=ids)
    past = {
        f"past_key_values.{layer}.{part}": np.zeros((3, 2, 0, 8), np.float32)
        for layer in range(2)
        for part in ("key", "value")
    }
    shown = {"attention_mask": mask, "position_ids": positions}
    whole, *_ = run("decoder_model_merged", inputs_embeds=embeds, **shown, **past)
    expected = model(inputs_embeds=torch.from_numpy(embeds), **shown, selection="dense").logits
    assert_close(whole[mask.bool().numpy()], expected[mask.bool()])
    first = {"attention_mask": mask[:, :7], "position_ids": positions[:, :7]}
    _, *present = run("decoder_model_merged", inputs_embeds=embeds[:, :7], **first, **past)
    second = {"attention_mask": mask, "position_ids": positions[:, 7:]} | dict(zip(past, present))
    logits, *_ = run("decoder_model_merged", inputs_embeds=embeds[:, 7:], **second)
    assert_close(logits, expected[:, 7:])


@torch.no_grad()
def test_the_attention_graph_reads_what_the_pointer_reads(exported):
    model, run = exported["attention"]
    embeds, positions = torch.randn(3, 12, 32), (2 * torch.arange(12)).expand(3, -1)
    rows = torch.tensor([[1, 4, 11]] * 3)
    (attention,) = run("attention_pointer", inputs_embeds=embeds, position_ids=positions, rows=rows)
    maps = attention_of_rows(model.model.text_model, embeds, torch.ones_like(positions), positions, rows)
    assert_close(attention, torch.stack([each.mean(1) for each in maps], dim=1))


@torch.no_grad()
@pytest.mark.parametrize("words", [1, 7, 150])
def test_the_selector_graphs_read_what_the_selector_reads(words, exported):
    """Of more than 128 words, the selector reads the last ones, and the estimator all."""
    model, run = exported["selector"]
    selector, estimator = model.model.selector, model.model.complexity_estimator
    question, glance, mask = torch.randn(3, words, 32), torch.randn(3, 16, 32), torch.ones(3, words, dtype=torch.bool)
    relevance, state, logits = run("selector", question_embeds=question, glance=glance)
    expected = selector(question, mask, glance)
    assert_close(relevance, expected[0])
    assert_close(state, expected[1])
    assert_close(logits, estimator(question, mask, glance))
    is_global = torch.tensor([True, False, False])
    (scores,) = run("selector_match", question_state=state, image_features=glance, is_global=is_global)
    assert_close(scores, selector.match_tokens(torch.from_numpy(state), glance, is_global))


def inputs_of(path):
    return [each.name for each in onnxruntime.InferenceSession(path).get_inputs()]


def test_the_folder_has_the_published_layout(tmp_path):
    output = tmp_path / "out"
    export.export(export.ExportArguments(str(DENSE), str(output), "onnx", list(export.VARIANTS)))
    names = {"vision_encoder", "embed_tokens", "decoder_model_merged", "block_encoder", "attention_pointer"}
    assert set(export.VARIANTS) == {"fp32", *export_onnx.CONVERT}
    suffixes = ["", *(f"_{variant}" for variant in export_onnx.CONVERT)]
    assert {path.name for path in (output / "onnx").iterdir()} == {f"{n}{s}.onnx" for n in names for s in suffixes}
    for path in (output / "onnx").iterdir():
        onnx.checker.check_model(path)
        assert {each.domain for each in onnx.load(path).opset_import} <= {"", "com.microsoft"}
    cache = [f"past_key_values.{layer}.{part}" for layer in range(6) for part in ("key", "value")]
    for suffix in suffixes:
        assert inputs_of(output / "onnx" / f"vision_encoder{suffix}.onnx") == ["pixel_values", "pixel_attention_mask"]
        assert inputs_of(output / "onnx" / f"embed_tokens{suffix}.onnx") == ["input_ids"]
        decoder = output / "onnx" / f"decoder_model_merged{suffix}.onnx"
        assert inputs_of(decoder) == ["inputs_embeds", "attention_mask", "position_ids", *cache]
        outputs = [each.name for each in onnxruntime.InferenceSession(decoder).get_outputs()]
        assert outputs == ["logits", *(name.replace("past_key_values", "present") for name in cache)]
    for path in (ROOT / "hub_cards" / "qgsa_onnx").glob("*.py"):
        assert (output / "qgsa_onnx" / path.name).read_text() == path.read_text()
    assert 'OnnxModel(".", variant="fp32")' in (output / "README.md").read_text()
    assert (output / "model.safetensors").exists() and json.loads((output / "config.json").read_text())["auto_map"]


def test_only_the_chosen_variants_are_written(tmp_path):
    export.export(export.ExportArguments(str(TINY), str(tmp_path / "out"), "onnx", ["int8"]))
    names = ("vision_encoder", "embed_tokens", "decoder_model_merged", "block_encoder", "selector", "selector_match")
    assert {path.name for path in (tmp_path / "out" / "onnx").iterdir()} == {f"{name}_int8.onnx" for name in names}
    (positions,) = (
        each
        for each in onnx.load(tmp_path / "out" / "onnx" / "block_encoder_int8.onnx").graph.initializer
        if "position_embedding" in each.name
    )
    assert positions.data_type == onnx.TensorProto.FLOAT


def test_both_pointers_and_a_scaled_glance_have_graphs_where_wanted(tmp_path):
    """As `make engines` writes them, of random weights."""
    output, wanted = tmp_path / "out", {"onnx_pointers": ["attention", "selector"], "glance_downscale": 2}
    export.export(export.ExportArguments(str(DENSE), str(output), "onnx", ["fp32"], **wanted, random_weights=True))
    ours = {"attention_pointer", "selector", "selector_match", "block_encoder", "glance_encoder"}
    published = {"vision_encoder", "embed_tokens", "decoder_model_merged"}
    assert {path.stem for path in (output / "onnx").iterdir()} == published | ours
    config = json.loads((output / "config.json").read_text())
    assert (config["pointer"], config["glance_downscale"]) == ("attention", 2)


@pytest.mark.parametrize(
    "fields, complaint",
    [
        ({"onnx_pointers": ["guide"]}, r"onnx_pointers \('guide'\): choose from attention, selector"),
        ({"glance_downscale": 3}, r"glance_downscale \(3\) must divide the patches along a tile \(8\)"),
        ({"onnx_pointers": ["selector"], "model": str(DENSE)}, "was never trained"),
    ],
)
def test_pointers_and_scales_that_do_not_exist_are_refused(fields, complaint, tmp_path):
    given = {"model": str(TINY), "output_dir": str(tmp_path / "out"), "format": "onnx"}
    with pytest.raises(ValueError, match=complaint):
        export.export(export.ExportArguments(**given | fields))
    assert not (tmp_path / "out").exists()


def changed(tmp_path, **fields):
    """A copy of the tiny checkpoint with another configuration."""
    folder = shutil.copytree(TINY, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.mark.parametrize(
    "fields, variants, complaint",
    [
        ({}, ["int4"], r"onnx_variants \('int4'\): choose from fp32, fp16, int8, q4"),
        ({}, [], r"onnx_variants \(''\): choose from"),
        ({"vision_layers": ["cross"] * 6}, ["fp32"], "in the graphs all layers are full"),
        ({"positions_per_image": 40}, ["fp32"], "its runtime has neither exact counts nor compact positions"),
        ({"positions": "compact"}, ["fp32"], "its runtime has neither exact counts nor compact positions"),
        ({"vision_schedules": ["CCCCCC", "FFFFFF"], "vision_policy": True}, ["fp32"], "in the graphs all layers"),
    ],
)
def test_what_the_graphs_cannot_do_is_refused(fields, variants, complaint, tmp_path):
    model = changed(tmp_path, **fields)
    with pytest.raises(ValueError, match=complaint):
        export.export(export.ExportArguments(str(model), str(tmp_path / "out"), "onnx", variants))
    assert not (tmp_path / "out").exists()


def test_an_untrained_selector_is_refused(make_dense, tokenizer, tmp_path):
    model = QGSASmolVLMForConditionalGeneration.from_dense(make_dense(), tokenizer, pointer="selector")
    with pytest.raises(ValueError, match="was never trained"):
        export_onnx.export_graphs(model, tmp_path / "onnx", ["fp32"])


def test_a_graph_too_large_for_a_file_is_refused(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr("export_onnx.MAX_BYTES", 2**16)
    with pytest.raises(ValueError, match=r"vision_encoder has .* GB of weights, and a file at most 2"):
        export_onnx.export_graphs(make_model(), tmp_path / "onnx", ["fp32"])
    assert not (tmp_path / "onnx").exists()


def test_missing_packages_are_named_in_one_line(tmp_path):
    code = (
        "import importlib.util as util, runpy, sys; find = util.find_spec; "
        "util.find_spec = lambda name: None if name.startswith('onnx') else find(name); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, ROOT / "hub_cards" / "export.py", "--model", TINY, "--format", "onnx"]
    done = subprocess.run([*map(str, command), "--output_dir", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: format ('onnx') needs onnx and onnxruntime: pip install -e '.[onnx]'" in done.stderr
