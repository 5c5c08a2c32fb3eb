"""On ONNX Runtime a checkpoint gives the tokens of torch, from the same tiles, without torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import export
import numpy as np
import pytest
import torch
from PIL import Image

from modeling_qgsa import QGSAProcessor, QGSASmolVLMForConditionalGeneration, configuration_qgsa
from modeling_qgsa.layout_qgsa import VisualLayout, token_relevance
from training.data.cards import Cards


onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[onnx]'")
onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install -e '.[onnx]'")
qgsa_onnx = pytest.importorskip("qgsa_onnx")

ROOT = Path(__file__).parents[2]
TINY = ROOT / "hub_cards" / "tiny-qgsa"
DENSE = ROOT / "hub_cards" / "tiny-dense"
QUESTION = "what shape is on the red card?"
CALIBRATED = {
    "attention_weights": [[0.5, 0.1], [1.5, -0.2], [1.0, 0.4]],
    "attention_temperature": 0.2,
    "attention_coverage": 0.5,
    "attention_nowhere": 0.4,
}
BUDGETS = [
    {"selection": "dense"},
    {},
    {"max_tiles": 1},
    {"min_tiles": 2, "max_tiles": 2},
    {"min_visual_tokens": 20, "max_visual_tokens": 20},
    {"min_tiles": 0, "max_tiles": 0},
    {"max_image_tokens": 40},
]
BLOCKS = [
    {"selection": "blocks"},
    {"selection": "blocks", "max_image_tokens": 24},
    {"selection": "blocks", "min_tiles": 2, "max_tiles": 2, "min_visual_tokens": 20, "max_visual_tokens": 20},
    {"selection": "blocks", "min_tiles": 1, "max_tiles": 1, "min_visual_tokens": 30, "max_visual_tokens": 30},
]
HALF_GLANCES = ["selector-half", "attention-half"]


def save_grouped(folder):
    """A random checkpoint whose text model has two query heads per key."""
    config = json.loads((DENSE / "config.json").read_text())
    config["text_config"]["num_key_value_heads"] = 2
    shutil.copytree(DENSE, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Exports: a trained selector, the attention of a dense checkpoint, calibrated, and of a random one.

    The first two also with a glance at half of its resolution.
    """
    folder = tmp_path_factory.mktemp("exports")
    save_grouped(folder / "grouped-dense")
    QGSASmolVLMForConditionalGeneration.from_dense(DENSE, **CALIBRATED).save_pretrained(folder / "calibrated-qgsa")
    for name, (source, variants, options) in {
        "selector": (TINY, ["fp32", "int8"], {}),
        "attention": (DENSE, ["fp32", "int8", "fp16", "q4"], {}),
        "calibrated": (folder / "calibrated-qgsa", ["fp32"], {"processor": str(DENSE)}),
        "selector-half": (TINY, ["fp32"], {"glance_downscale": 2}),
        "attention-half": (DENSE, ["fp32"], {"glance_downscale": 2}),
        "grouped": (folder / "grouped-dense", ["fp32"], {"random_weights": True}),
    }.items():
        export.export(export.ExportArguments(str(source), str(folder / name), "onnx", variants, **options))
    return folder


@pytest.fixture(scope="module")
def load(folders):
    """Loads an export once, in torch with its processor, and on ONNX Runtime with one thread."""
    loaded = {}

    def load(name, variant="fp32"):
        if (name, variant) not in loaded:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            model = QGSASmolVLMForConditionalGeneration.from_pretrained(folders / name).eval()
            processor = QGSAProcessor.from_pretrained(folders / name, backend="pil")
            runtime = qgsa_onnx.OnnxModel(folders / name, variant, sess_options=options)
            loaded[name, variant] = model, processor, runtime
        return loaded[name, variant]

    return load


@pytest.fixture(scope="module")
def cards():
    return [(sample["question"], [sample["image"]]) for sample in Cards("validation", 24)]


def answers(loaded, prompt, images, scores=None, **budget):
    """Both answers to a prompt, as token ids and selection each; torch selects nothing for "dense"."""
    model, processor, runtime = loaded
    inputs = processor(text=prompt, images=images, return_tensors="pt")
    given = {} if scores is None else {"visual_token_scores": torch.from_numpy(scores)[None]}
    options = {"max_new_tokens": 6, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **given, **options, **budget)
    ids = expected.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    answer = runtime.generate(prompt, images, max_new_tokens=6, visual_token_scores=scores, **budget)
    return answer, ids, expected.get("selection")


def assert_same(answer, ids, selection):
    assert answer.ids == ids
    if selection is None:
        assert answer.selection.tiles.all() and answer.selection.kept.all()
        return
    assert answer.selection.tiles.tolist() == selection.kept_tiles[0].tolist()
    assert answer.selection.kept.ravel().tolist() == selection.kept_tokens[0].tolist()
    np.testing.assert_allclose(answer.selection.relevance, selection.relevance.flatten(1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("name", ["selector", "attention", "calibrated", "grouped"])
def test_tokens_and_tiles_are_those_of_torch(name, budget, load, cards):
    for question, images in cards[:5]:
        assert_same(*answers(load(name), qgsa_onnx.chat_prompt(question), images, **budget))


@pytest.mark.parametrize("budget", BLOCKS, ids=str)
@pytest.mark.parametrize("name", ["selector", "attention", "calibrated", *HALF_GLANCES])
def test_blocks_are_those_of_torch(name, budget, load, cards):
    for question, images in cards[:3]:
        assert_same(*answers(load(name), qgsa_onnx.chat_prompt(question), images, **budget))


@pytest.mark.parametrize("name", HALF_GLANCES)
@pytest.mark.parametrize("budget", [{"selection": "dense"}, {}], ids=str)
def test_a_glance_at_half_of_its_resolution_is_that_of_torch(name, budget, load, cards):
    model, _, runtime = load(name)
    assert model.config.glance_downscale == runtime.config["glance_downscale"] == 2
    for question, images in cards[:3]:
        assert_same(*answers(load(name), qgsa_onnx.chat_prompt(question), images, **budget))


@pytest.mark.parametrize("name", ["selector", "attention", "calibrated", *HALF_GLANCES])
@pytest.mark.parametrize("size", [(256, 64), (64, 128), (300, 200), (64, 64)])
@pytest.mark.parametrize("selection", ["before_encoder", "blocks"])
def test_images_of_other_shapes(name, size, selection, load, make_image):
    images = [make_image(1, *size)]
    assert_same(*answers(load(name), qgsa_onnx.chat_prompt(QUESTION), images, selection=selection))


@pytest.mark.parametrize("name", ["selector", "attention", "calibrated", "selector-half"])
@pytest.mark.parametrize("budget", [{"selection": "dense"}, {}, {"max_tiles": 1}, {"selection": "blocks"}], ids=str)
def test_several_images(name, budget, load, make_image):
    images = [make_image(1), make_image(2, 256, 64), make_image(3, 64, 64)]
    assert_same(*answers(load(name), qgsa_onnx.chat_prompt(QUESTION, 3), images, **budget))


@pytest.mark.parametrize("name", ["selector", "attention", "selector-half"])
@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>User:<image>how many cards are there?<end_of_utterance>\nAssistant: 3<end_of_utterance>\n"
        f"User: {QUESTION}<end_of_utterance>\nAssistant:",
        f"<|im_start|>User:<image>{QUESTION}",
        "<|im_start|>User:<image><end_of_utterance>\nAssistant:",
        f"<|im_start|>User: {QUESTION}<image><end_of_utterance>\nAssistant: it is a",
        f"<|im_start|>User:<image>{QUESTION}<end_of_utterance>\nAssistant: moon<end_of_utterance>\n",
    ],
    ids=["turns", "open turn", "no question", "begun answer", "answered"],
)
def test_the_question_is_that_of_torch(name, prompt, load, make_image):
    answer, ids, selection = answers(load(name), prompt, [make_image(1)])
    assert answer.ids == ids and answer.selection.kept.ravel().tolist() == selection.kept_tokens[0].tolist()


def test_prompts_without_images(load):
    answer, ids, _ = answers(load("attention"), qgsa_onnx.chat_prompt(QUESTION, 0), [])
    assert answer.ids == ids and answer.text


def test_the_prompt_is_that_of_the_chat_template(load):
    _, processor, _ = load("attention")
    for count in (0, 1, 2):
        content = [{"type": "image"}] * count + [{"type": "text", "text": QUESTION}]
        expected = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert qgsa_onnx.chat_prompt(QUESTION, count) == expected


@pytest.mark.parametrize("name", ["selector", "attention"])
@pytest.mark.parametrize("budget", [{}, {"min_tiles": 2, "max_tiles": 2, "min_visual_tokens": 60}], ids=str)
@pytest.mark.parametrize("selection", ["before_encoder", "blocks"])
def test_given_scores_replace_those_of_the_pointer(name, budget, selection, load, make_image):
    scores = np.random.default_rng(0).standard_normal(17 * 16).astype(np.float32)
    loaded, budget = load(name), budget | {"selection": selection}
    if "min_tiles" in budget:
        budget = budget | {"max_visual_tokens": 60}  # the same for every question: no pointer is needed
    assert_same(*answers(loaded, qgsa_onnx.chat_prompt(QUESTION), [make_image(1)], scores, **budget))


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "CMYK"])
@pytest.mark.parametrize("size", [(256, 256), (300, 200), (77, 500), (64, 64)])
def test_pixels_are_those_of_the_stock_processor(mode, size, load, make_image):
    _, processor, runtime = load("attention")
    image = make_image(4, *size).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(size))
    expected = processor(text="<image>", images=[image], return_tensors="pt")["pixel_values"][0].numpy()
    cut = runtime.open(image)
    assert np.array_equal([cut.cut(number) for number in range(len(expected))], expected)


@pytest.mark.parametrize("name", ["selector", "attention", "attention-half"])
@pytest.mark.parametrize("budget", [{"selection": "dense"}, {}, {"min_tiles": 2, "max_tiles": 2}, BLOCKS[-1]])
def test_questions_about_an_opened_image_encode_no_tile_twice(name, budget, load, make_image, monkeypatch):
    runtime, image, other = load(name)[2], make_image(3), make_image(4)
    encoded, run = [], runtime.run
    monkeypatch.setattr(runtime, "run", lambda graph, **feeds: encoded.append(graph) or run(graph, **feeds))

    def ask(question, *images):
        encoded.clear()
        answer = runtime.generate(qgsa_onnx.chat_prompt(question, len(images)), images, max_new_tokens=6, **budget)
        return answer, encoded.count("vision_encoder") + encoded.count("glance_encoder")

    opened, known = runtime.open(image), 0
    for question, others in [(QUESTION, []), ("how many cards?", []), (QUESTION, [other])]:
        (expected, every), (found, new) = ask(question, image, *others), ask(question, opened, *others)
        assert found.ids == expected.ids and np.array_equal(found.selection.features, expected.selection.features)
        if not others:
            assert new == len(opened.encoded) - known
        known = len(opened.encoded)
    assert 0 < new < every and ask(QUESTION, opened)[1] == 0


def test_an_image_is_opened_once_for_models_that_cut_it_alike(load, make_image):
    (*_, first), (*_, second) = load("selector"), load("attention")
    prompt, opened = qgsa_onnx.chat_prompt(QUESTION), first.open(make_image(3))
    assert first.generate(prompt, [opened], 6).ids == first.generate(prompt, [make_image(3)], 6).ids
    assert second.generate(prompt, [opened], 6).ids == second.generate(prompt, [make_image(3)], 6).ids
    other = qgsa_onnx.inputs.TiledImage.of(make_image(3), first.settings | {"do_image_splitting": False})
    with pytest.raises(ValueError, match="images: opened by a model that cuts them otherwise"):
        first.generate(prompt, [other], 6)


@pytest.mark.parametrize("variant, least", [("fp16", 24), ("int8", 20), ("q4", 16)])
def test_the_other_variants_mostly_agree(variant, least, load, cards):
    """Answers as torch's in float32, on a Xeon with AVX-512 VNNI: 24 of 24 in fp16, 23 in int8 and 22 in q4."""
    same = sum(
        answer.ids == ids
        for answer, ids, _ in (
            answers(load("attention", variant), qgsa_onnx.chat_prompt(question), images) for question, images in cards
        )
    )
    assert same >= least


# Published repositories


@pytest.fixture(scope="module")
def published(folders, tmp_path_factory):
    """A folder as published: a plain checkpoint, three graphs and no pointer."""
    folder = tmp_path_factory.mktemp("published") / "smolvlm"
    shutil.copytree(folders / "attention", folder, ignore=shutil.ignore_patterns("attention_pointer*", "*.py"))
    shutil.copyfile(DENSE / "config.json", folder / "config.json")
    return folder


def test_published_files_run_unchanged(published, load, make_image):
    runtime, (_, _, full) = qgsa_onnx.OnnxModel(published), load("attention")
    prompt, images = qgsa_onnx.chat_prompt(QUESTION), [make_image(1)]
    scores = np.repeat(np.arange(17, dtype=np.float32), 16)  # one per tile, the last tiles first
    for options in ({"selection": "dense"}, {"max_tiles": 0}, {"max_tiles": 2, "visual_token_scores": scores}):
        answer = runtime.generate(prompt, images, max_new_tokens=6, **options)
        expected = full.generate(prompt, images, max_new_tokens=6, **options)
        if "visual_token_scores" in options:  # without a pointer the whole budget is used
            assert answer.selection.tiles.tolist() == [False] * 14 + [True] * 3
            options = {**options, "min_tiles": 2, "min_visual_tokens": 80}
            expected = full.generate(prompt, images, max_new_tokens=6, **options)
        assert answer.ids == expected.ids


def test_graphs_with_inputs_in_float16_run(published, tmp_path, make_image):
    """As those that other exporters write: the cache is float16, too."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    folder = shutil.copytree(published, tmp_path / "half")
    for path in (folder / "onnx").glob("*_fp16.onnx"):
        source = onnx.load(path.with_name(path.name.replace("_fp16", "")))
        onnx.save(convert_float_to_float16(source, keep_io_types=False), path)
    prompt, images = qgsa_onnx.chat_prompt(QUESTION), [make_image(1)]
    first, second = (
        qgsa_onnx.OnnxModel(source, "fp16").generate(prompt, images, selection="dense")
        for source in (published, folder)
    )
    assert first.ids == second.ids


def test_a_decoder_that_counts_positions_itself_answers_dense_only(published, tmp_path, make_image):
    """Some published decoders lack position_ids; what is kept would move together."""
    folder = shutil.copytree(published, tmp_path / "counting")
    graph = onnx.load(folder / "onnx" / "decoder_model_merged.onnx")
    (positions,) = (each for each in graph.graph.input if each.name == "position_ids")
    graph.graph.input.remove(positions)
    counted = [
        onnx.helper.make_node("Shape", ["inputs_embeds"], ["sizes"]),
        onnx.helper.make_node("Gather", ["sizes", "one"], ["length"]),
        onnx.helper.make_node("Range", ["zero", "length", "one"], ["range"]),
        onnx.helper.make_node("Unsqueeze", ["range", "axes"], ["position_ids"]),
    ]
    for number, node in enumerate(counted):
        graph.graph.node.insert(number, node)
    for name, value in (("zero", 0), ("one", 1), ("axes", [0])):
        graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), name))
    onnx.save(graph, folder / "onnx" / "decoder_model_merged.onnx")
    runtime, prompt, images = qgsa_onnx.OnnxModel(folder), qgsa_onnx.chat_prompt(QUESTION), [make_image(1)]
    expected = qgsa_onnx.OnnxModel(published).generate(prompt, images, 1, selection="dense")
    assert runtime.generate(prompt, images, 1, selection="dense").ids == expected.ids
    with pytest.raises(ValueError, match="the decoder has no position_ids"):
        runtime.generate(prompt, images, max_tiles=0)


@pytest.mark.parametrize("size", [(256, 256), (300, 200), (64, 256), (64, 64)])
def test_the_relevance_of_places_is_that_of_torch(size, load, make_image):
    model, processor, runtime = load("attention")
    images, relevance = [make_image(4, *size), make_image(5, 128, 192)], torch.randn(2, 16)
    inputs = processor(text="<image>" * 2, images=images, return_tensors="pt")
    layout = VisualLayout.of(model.config, inputs["input_ids"])
    cut = [runtime.open(image) for image in images]
    prompt = qgsa_onnx.inputs.Prompt.of(runtime.tokenizer, "<image>" * 2, cut, 16)
    found = qgsa_onnx.selection.token_relevance(relevance.numpy(), prompt)
    np.testing.assert_allclose(found, token_relevance(relevance, layout).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("selection", ["before_encoder", "blocks"])
def test_one_number_limits_as_it_does_in_torch(selection, load):
    model, _, runtime = load("selector")
    for number in [*range(1, 200), 2**31 - 1]:
        for given in ({}, {"min_tiles": 0}, {"max_tiles": 3, "min_tiles": 1}, {"min_visual_tokens": 1}):
            given = given | {"selection": selection, "max_image_tokens": number}
            try:
                expected = vars(configuration_qgsa.Budget.of(model.config, **given))
            except ValueError as error:
                with pytest.raises(ValueError) as found:
                    qgsa_onnx.selection.Budget.of(runtime.config, given)
                assert str(found.value) == str(error)
                continue
            expected.pop("positions_per_image")
            assert vars(qgsa_onnx.selection.Budget.of(runtime.config, given)) == expected


def test_an_export_without_the_graph_of_blocks_answers_otherwise(folders, load, tmp_path, make_image):
    """As those of earlier versions."""
    folder = shutil.copytree(folders / "selector", tmp_path / "earlier")
    (folder / "onnx" / "block_encoder.onnx").unlink()
    runtime, call = qgsa_onnx.OnnxModel(folder), (qgsa_onnx.chat_prompt(QUESTION), [make_image(1)])
    assert runtime.generate(*call).ids == load("selector")[2].generate(*call).ids
    with pytest.raises(
        ValueError, match=r'selection \("blocks"\): .* has no onnx/block_encoder.onnx: export it again'
    ):
        runtime.generate(*call, selection="blocks")


# Bad input


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"selection": "after_encoder"}, r"selection \('after_encoder'\): choose from before_encoder, blocks, dense"),
        ({"max_image_tokens": 0}, r"max_image_tokens \(0\) must be an integer of 1 to 2147483647"),
        ({"max_image_tokens": 9.5}, r"max_image_tokens \(9.5\) must be an integer"),
        ({"max_image_tokens": 9, "selection": "dense"}, r'max_image_tokens \(9\): not available with .* "dense"'),
        ({"max_image_tokens": 9, "max_visual_tokens": 9}, r"\(9, .*\) contradicts max_visual_tokens \(9\)"),
        ({"max_tiles": 1.5}, r"max_tiles \(1.5\) must be an integer of at most 2147483647"),
        ({"min_tiles": 9}, r"min_tiles \(9\) must not exceed max_tiles \(4\)"),
        ({"min_visual_tokens": 0}, r"min_visual_tokens \(0\) must be at least 1"),
        ({"tiles": 1}, r"unexpected arguments: tiles"),
        ({"images": []}, r"prompt \(1 times <image>\) must name each of the 0 images"),
        ({"images": ["a.png"]}, r"images \(str\) must hold PIL images"),
        ({"images": [Image.new("RGB", (900, 3))]}, r"images \(900 x 3 px\): each side"),
        ({"visual_token_scores": np.zeros(16)}, r"visual_token_scores \(shape \(16,\)\) must hold .* 272 visual"),
        ({"visual_token_scores": np.full(272, np.nan)}, "must hold a finite number"),
    ],
)
def test_bad_calls_are_refused(options, complaint, load, make_image):
    _, _, runtime = load("attention")
    with pytest.raises((ValueError, TypeError), match=complaint):
        runtime.generate(qgsa_onnx.chat_prompt(QUESTION), **{"images": [make_image(1)]} | options)


def test_without_a_pointer_something_has_to_choose(published, make_image):
    runtime = qgsa_onnx.OnnxModel(published)
    with pytest.raises(
        ValueError, match=r"visual_token_scores \(None\): this folder has no pointer .* max_tiles=0 or"
    ):
        runtime.generate(qgsa_onnx.chat_prompt(QUESTION), [make_image(1)])


def test_a_relevance_that_is_not_finite_is_refused(folders, tmp_path, make_image):
    folder = shutil.copytree(folders / "attention", tmp_path / "nan")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_temperature": float("nan")}))
    with pytest.raises(ValueError, match="relevance holds NaN"):
        qgsa_onnx.OnnxModel(folder).generate(qgsa_onnx.chat_prompt(QUESTION), [make_image(1)])


def without(name):
    return lambda folder: (folder / name).unlink()


def of_type(kind):
    return lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": kind}))


def scaled_down(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"glance_downscale": 2}))


def with_tokenizer_of_words(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = []
    tokenizer["model"]["vocab"] = {"<|endoftext|>": 0}
    tokenizer["model"]["merges"] = []
    tokenizer["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    "spoil, variant, complaint",
    [
        (lambda folder: None, "int4", r"variant \('int4'\): choose from fp32, fp16, int8, q4"),
        (lambda folder: None, "q4", "has no onnx/vision_encoder_q4.onnx: export it with --format onnx"),
        (without("onnx/selector.onnx"), "fp32", "has no onnx/selector.onnx"),
        (scaled_down, "fp32", "has no onnx/glance_encoder.onnx: export it with --format onnx"),
        (without("config.json"), "fp32", "has no config.json"),
        (without("preprocessor_config.json"), "fp32", "has no preprocessor_config.json"),
        (of_type("qwen2_vl"), "fp32", r"model_type \('qwen2_vl' in .*\) must be qgsa_smolvlm, idefics3 or smolvlm"),
        (with_tokenizer_of_words, "fp32", "has a tokenizer without <image>"),
    ],
)
def test_bad_folders_are_refused_in_one_line(spoil, variant, complaint, folders, tmp_path):
    folder = shutil.copytree(folders / "selector", tmp_path / "folder")
    spoil(folder)
    with pytest.raises((ValueError, OSError), match=complaint) as error:
        qgsa_onnx.OnnxModel(folder, variant)
    assert "\n" not in str(error.value)


def run_in(folder, code, *blocked):
    """Run code in a folder, where some packages cannot be imported."""
    block = f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
    return subprocess.run([sys.executable, "-c", block + code], cwd=folder, capture_output=True, text=True)


def test_an_export_answers_by_itself_without_torch_and_transformers(folders, make_image):
    make_image(1).save(folders / "selector" / "image.png")
    card = (folders / "selector" / "README.md").read_text()
    code = card.split("## ONNX Runtime", 1)[1].split("```python\n")[1].split("```")[0]
    done = run_in(folders / "selector", code, "torch", "transformers", "modeling_qgsa", "huggingface_hub")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and not done.stderr


def test_a_missing_onnxruntime_is_named(folders):
    done = run_in(folders / "selector", "import qgsa_onnx", "onnxruntime")
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: onnxruntime is not installed: pip install onnxruntime"
    )
