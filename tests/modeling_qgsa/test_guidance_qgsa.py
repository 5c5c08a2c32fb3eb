"""A pair of models: the guide's map is its own attention, and the pair equals its parts at the ends of every scale."""

import copy
import logging
import subprocess
import sys

import pytest
import torch

from modeling_qgsa import GuidedVLM, QGSAProcessor
from modeling_qgsa.guidance_qgsa import choose_threshold
from modeling_qgsa.guide_qgsa import Guidance, ask_guide, overlap, resample, target_options, tile_masses, to_map
from modeling_qgsa.layout_qgsa import VisualLayout


TOKENS = {"max_new_tokens": 4}
NEVER, ALWAYS = 1.5, -1.0


def make_layout(grids, side, glance_of=None):
    """A layout of images with these grids, one per sample, without prompts."""
    tiles = [
        (image, *divmod(number, columns))
        for image, (rows, columns) in enumerate(grids)
        for number in range(rows * columns)
    ]
    parts = []
    for image in range(len(grids)):
        parts += [tile for tile in tiles if tile[0] == image] + [(image, -1, -1)]
    image, row, column = torch.tensor(parts).T.contiguous()
    first = torch.searchsorted(image, image)
    return VisualLayout(
        tile_sample=image,
        tile_image=image,
        tile_ordinal=torch.arange(len(image)) - first,
        tile_row=row,
        tile_column=column,
        tile_start=torch.zeros_like(image),
        tile_of_position=torch.full((len(grids), 1), -1),
        grids=torch.tensor(grids),
        tokens_per_tile=side**2,
    )


@pytest.fixture(scope="module")
def guide(make_dense, make_model):
    return make_model(make_dense(), pointer="attention", keep_tile_markers=True)


@pytest.fixture(scope="module")
def target(make_deep):
    """A model of four layers, of other weights."""
    return make_deep(seed=7)


@pytest.fixture(scope="module")
def pair_of(guide, target, processor):
    return lambda **guidance: GuidedVLM(guide, target, processor, **guidance)


# What the guide reads


@torch.no_grad()
@pytest.mark.parametrize("view", ["dense", "selection", "glance"])
def test_scores_are_the_sums_of_eager_attention_maps(guide, batch, view):
    reading = ask_guide(guide, batch | TOKENS, Guidance(view=view, exit_threshold=0.5))
    eager = copy.deepcopy(guide)
    eager.set_attn_implementation("eager")
    layout = reading.layout
    options = {
        "dense": {"selection": "after_encoder", "min_visual_tokens": 9999, "max_visual_tokens": 9999},
        "selection": {},
        "glance": {"min_tiles": 0, "max_tiles": 0, "min_visual_tokens": 16, "max_visual_tokens": 16},
    }[view]
    for row in range(3):
        shown = reading.answer.shown[row].long()
        inputs = batch | {
            "input_ids": torch.cat([batch["input_ids"], reading.answer.ids], 1)[row : row + 1],
            "attention_mask": torch.cat([batch["attention_mask"][row], shown])[None],
            "question_mask": torch.cat([batch["question_mask"][row], 0 * shown])[None],
        }
        inputs |= {name: batch[name][row : row + 1] for name in ("pixel_values", "pixel_attention_mask")}
        outputs = eager(**inputs, **options, output_attentions=True)
        kept = outputs.selection.keep_indices[0]
        total = sum(attention[0].sum(0) for attention in outputs.attentions)  # (rows, columns)
        tile = torch.cat([layout.tile_of_position[row], torch.full_like(shown, -1)])[kept]
        behind = (tile >= 0).cumsum(0) > 0
        last = int(shown.sum()) - int(len(shown))  # the last token of the answer predicts nothing
        rows = (tile < 0) & behind & (kept >= 0)
        rows[len(kept) - 1 + last if last else -1] = False
        expected = total[rows].sum(0)
        for number in (layout.tile_sample == row).nonzero()[:, 0].tolist():
            places = layout.token_positions[number]
            for place, score in zip(places.tolist(), reading.scores[number].tolist()):
                column = (kept == place).nonzero()[:, 0]
                assert score == pytest.approx(float(expected[column]) if len(column) else 0.0, abs=1e-4)


@torch.no_grad()
def test_the_answer_and_its_confidence_are_those_of_stock(guide, batch):
    reading = ask_guide(guide, batch | TOKENS, Guidance())
    output = guide.generate(
        **batch, **TOKENS, selection="dense", do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(reading.answer.ids, output.sequences[:, -4:])
    chances = guide.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    assert torch.allclose(reading.answer.confidence, chances.mean(1).exp(), atol=1e-5)


@pytest.mark.parametrize("view", ["dense", "selection", "glance"])
@pytest.mark.parametrize("scores", ["attention", "pointer"])
def test_a_guide_reads_a_batch_as_single_samples(guide, batch, samples, prepare, view, scores):
    guidance = Guidance(view=view, scores=scores, exit_threshold=0.5)
    together = ask_guide(guide, batch | TOKENS, guidance)
    for row, sample in enumerate(samples):
        alone = ask_guide(guide, prepare(sample) | TOKENS, guidance)
        own = together.layout.tile_sample == row
        assert torch.allclose(together.scores[own], alone.scores, atol=1e-4)
        assert torch.equal(together.seen[own], alone.seen)
        assert torch.allclose(together.sureness[row : row + 1], alone.sureness, atol=1e-5)


def test_a_guide_that_selects_everything_looks_at_everything(guide, single):
    """Calibration sets "dense" where nothing less keeps the answers."""
    model = copy.deepcopy(guide)
    model.config.selection = "dense"
    readings = [
        ask_guide(each, single | TOKENS, Guidance(view=view))
        for each, view in ((model, "selection"), (guide, "dense"))
    ]
    assert readings[0].seen.all() and torch.equal(readings[0].scores, readings[1].scores)


def test_a_glance_encodes_one_tile(guide, single, tiles_encoded):
    with tiles_encoded(guide) as counts:
        ask_guide(guide, single | TOKENS, Guidance(view="glance", exit_threshold=0.5))
    assert counts == [1]


def test_a_dense_guide_encodes_each_tile_once_and_reads_no_glance(guide, single, tiles_encoded, monkeypatch):
    monkeypatch.setattr("modeling_qgsa.modeling_qgsa.make_pointer", None)
    with tiles_encoded(guide) as counts:
        ask_guide(guide, single | TOKENS, Guidance(exit_threshold=0.5))
    assert sum(counts) == 17


# Maps over image coordinates


def test_equal_grids_give_equal_scores():
    layout = make_layout([(2, 3), (1, 4)], 4)
    scores = torch.rand(len(layout.tile_image), 16)
    assert torch.equal(resample(scores, layout, layout), scores)


@pytest.mark.parametrize("sides", [(8, 9), (9, 8), (8, 13), (13, 9), (8, 8)])
@pytest.mark.parametrize("grids", [((4, 4), (3, 3)), ((2, 3), (4, 4)), ((1, 4), (2, 3))])
def test_sums_and_places_are_kept(sides, grids):
    """2048 and 1536 px, tiles of 64, 81 and 169 tokens: a spot stays where it is."""
    source, target = (make_layout([grid], side) for grid, side in zip(grids, sides))
    scores = torch.rand(len(source.tile_image), sides[0] ** 2)
    moved = resample(scores, source, target)
    for part in (source.is_global, ~source.is_global):
        other = target.is_global if part[-1] else ~target.is_global
        assert moved[other].sum() == pytest.approx(float(scores[part].sum()), rel=1e-4)
    flat = resample(torch.ones_like(scores), source, target)
    assert flat[~target.is_global].std() < 1e-5 and flat[target.is_global].std() < 1e-5
    for y, x in ((0.1, 0.1), (0.5, 0.9), (0.97, 0.3)):
        spot = torch.zeros_like(scores)
        (rows, columns), side = grids[0], sides[0]
        place = to_map(torch.arange(rows * columns * side**2).view(-1, side**2), rows, columns)
        spot.view(-1)[place[int(y * rows * side), int(x * columns * side)]] = 1.0
        found = to_map(resample(spot, source, target)[:-1], *grids[1])
        row, column = divmod(int(found.argmax()), found.shape[1])
        assert abs((row + 0.5) / found.shape[0] - y) < 1 / (rows * side) + 1 / found.shape[0]
        assert abs((column + 0.5) / found.shape[1] - x) < 1 / (columns * side) + 1 / found.shape[1]


def test_an_image_without_tiles_is_seen_through_its_glance():
    source, target = make_layout([(0, 0)], 4), make_layout([(2, 2)], 4)
    scores = torch.zeros(1, 16)
    scores[0, 5] = 1.0  # row 1, column 1 of 4 x 4: the first tile
    masses = resample(scores, source, target).sum(1)
    assert masses[:4].tolist() == pytest.approx([1, 0, 0, 0])
    assert resample(torch.rand(5, 16), target, source).shape == (1, 16)


def test_overlaps_are_shares():
    assert torch.allclose(overlap(3, 2).sum(0), torch.ones(2))
    assert torch.allclose(overlap(2, 4), torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]))


def test_masses_count_tiles_and_glance():
    layout = make_layout([(1, 2)], 2)
    scores = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0], [0, 2, 0, 2]])
    assert tile_masses(scores, layout).tolist() == pytest.approx([4, 4, 0])


# The pair


@pytest.mark.parametrize("prune_layer", [None, 0, 2])
def test_a_threshold_above_1_asks_the_target_and_below_0_never_does(pair_of, guide, target, batch, prune_layer):
    never, off, always = (
        pair_of(prune_layer=prune_layer, exit_threshold=threshold).generate(**batch, **TOKENS)
        for threshold in (NEVER, None, ALWAYS)
    )
    assert torch.equal(never.sequences, off.sequences) and not never.answered_by_guide.any()
    assert always.answered_by_guide.all() and not always.visual_tokens.any()
    assert torch.equal(always.sequences, guide.generate(**batch, **TOKENS, selection="dense"))
    assert (never.visual_tokens > 0).all() and off.consistency.isnan().all()


def test_everything_kept_is_the_target_bit_for_bit(pair_of, target, single):
    dense = target.generate(**single, **TOKENS, selection="dense", return_dict_in_generate=True, output_logits=True)
    for guidance in ({"prune_layer": 4, "retention": 0.1}, {"prune_layer": 2, "retention": 1.0}, {"max_tiles": 99}):
        output = pair_of(**guidance).generate(**single, **TOKENS)
        assert torch.equal(output.sequences, dense.sequences)


@pytest.mark.parametrize(
    "guidance",
    [
        {"prune_layer": 2, "retention": 0.2},
        {"prune_layer": 0, "retention": 0.2, "view": "glance"},
        {"max_tiles": 2},
        {"max_tiles": 3, "coverage": 0.3, "view": "selection"},
        {"scores": "pointer", "view": "glance", "max_tiles": 2},
    ],
)
def test_batch_equals_single(pair_of, batch, samples, prepare, guidance):
    sureness = pair_of(**guidance, exit_threshold=NEVER).generate(**batch, **TOKENS)
    sureness = (sureness.confidence + sureness.consistency) / 2
    between = float(sureness.sort().values[:2].mean())
    pair = pair_of(**guidance, exit_threshold=between)
    together = pair.generate(**batch, **TOKENS)
    assert 0 < int(together.answered_by_guide.sum()) < 3
    for row, sample in enumerate(samples):
        alone = pair.generate(**prepare(sample), **TOKENS)
        assert torch.equal(together.sequences[row, -4:], alone.sequences[0, -4:])
        for name in ("answered_by_guide", "visual_tokens", "tiles", "guide_tiles"):
            assert together[name][row] == alone[name][0], name


def test_retention_is_a_share_of_each_images_tokens(pair_of, batch):
    output = pair_of(prune_layer=2, retention=0.2).generate(**batch, **TOKENS)
    assert output.visual_tokens.tolist() == [55, 16, 29]  # of 272, 80 and 144


def test_tiles_are_those_with_the_most_attention(pair_of, guide, target, single):
    guidance = Guidance(max_tiles=2)
    reading = ask_guide(guide, single | TOKENS, guidance)
    layout = VisualLayout.of(target.config, single["input_ids"])
    best = tile_masses(reading.scores, layout)[:-1].topk(2).indices
    options = target_options(reading, layout, guidance)
    kept = target.select(**single, **options).kept_tiles[0, :16].nonzero()[:, 0]
    assert sorted(best.tolist()) == kept.tolist()


def test_coverage_makes_the_number_of_tiles_adaptive(pair_of, batch):
    few, many = (pair_of(max_tiles=16, coverage=share).generate(**batch, **TOKENS).tiles for share in (0.2, 0.9))
    assert (few < many).all() and (few > 0).all()


def test_several_images_and_lazy_tiles(pair_of, prepare, make_image):
    images = [make_image(0), make_image(1, 256, 64)]
    questions = ("which card is red?", images), ("how many cards are there?", [make_image(2, 64, 128)])
    for guidance in ({"max_tiles": 2}, {"prune_layer": 2}):
        pair = pair_of(**guidance)
        eager, lazy = prepare(*questions), prepare(*questions, lazy_tiles=True)
        assert torch.equal(pair.generate(**eager, **TOKENS).sequences, pair.generate(**lazy, **TOKENS).sequences)
    sure = pair_of(exit_threshold=NEVER).generate(**lazy, **TOKENS)
    threshold = float((sure.confidence + sure.consistency).max() / 2)
    one = pair_of(exit_threshold=threshold).generate(**lazy, **TOKENS)
    assert one.answered_by_guide.sum() == 1


def test_the_target_answers_texts(pair_of, target, tokenizer):
    inputs = tokenizer("hello there", return_tensors="pt", add_special_tokens=False)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    output = pair_of(exit_threshold=ALWAYS).generate(**inputs, **TOKENS)
    assert not output.answered_by_guide.any()
    assert torch.equal(output.sequences, target.generate(**inputs, **TOKENS))


def test_a_text_within_a_batch_of_images_is_the_targets(pair_of, target, prepare, make_image):
    inputs = prepare(("how many?", [make_image(2, 64, 128)]), ("how are you?", []))
    output = pair_of(exit_threshold=ALWAYS).generate(**inputs, **TOKENS)
    assert output.answered_by_guide.tolist() == [True, False]


def test_answers_end_where_a_model_ends_them(pair_of, guide, target, single):
    pair = pair_of(exit_threshold=ALWAYS)
    ids = pair.generate(**single, **TOKENS).sequences
    eos = int(ids[0, -3])
    short = pair.generate(**single, **TOKENS, eos_token_id=eos)
    assert torch.equal(short.sequences, ids[:, :-2])


def test_other_grids_need_inputs_of_their_own(make_dense, make_model, target, processor, stock_processor, make_image):
    """The guide merges 4 x 4 patches, so that it has 4 visual tokens a tile where the target has 16."""
    config = copy.deepcopy(make_dense().config)
    config.scale_factor = 4
    torch.manual_seed(5)
    guide = make_model(type(make_dense())._from_config(config).eval(), pointer="attention", keep_tile_markers=True)
    parts = {"image_seq_len": 4, "chat_template": stock_processor.chat_template}
    other = QGSAProcessor(stock_processor.image_processor, stock_processor.tokenizer, **parts)
    content = [{"type": "image"}, {"type": "text", "text": "where is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    for guidance in ({"max_tiles": 2}, {"prune_layer": 1}, {"exit_threshold": ALWAYS}):
        pair = GuidedVLM(guide, target, (other, processor), **guidance)
        inputs = pair.prepare(text=[text], images=[[make_image(0)]])
        output = pair.generate(**inputs, **TOKENS)
        assert output.sequences.shape[1] == inputs["input_ids"].shape[1] + 4
        with pytest.raises(ValueError, match="guide_inputs is missing: the guide reads 4 .* the target 16"):
            pair.generate(**{name: value for name, value in inputs.items() if name != "guide_inputs"})


@pytest.fixture(scope="module")
def siblings(make_dense, make_model):
    """A guide and a target that share their encoder, but not their connectors, as 256M and 500M do."""
    dense, other = make_dense(), make_dense()
    with torch.no_grad():
        other.model.connector.modality_projection.proj.weight.normal_()
    return [make_model(each, pointer="attention", keep_tile_markers=True) for each in (dense, other)]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("view, again", [("dense", 0), ("selection", None), ("glance", 2)])
def test_what_the_guide_encoded_is_not_encoded_again(
    siblings, processor, prepare, samples, tiles_encoded, view, again, lazy
):
    guide, target = siblings
    inputs = prepare(samples[0], lazy_tiles=lazy)
    pair = GuidedVLM(guide, target, processor, view=view, max_tiles=2)
    assert pair.shares_encoder
    with tiles_encoded(guide) as first, tiles_encoded(target) as second:
        output = pair.generate(**inputs, **TOKENS)
    assert sum(first) == int(output.guide_tiles) + 1 and output.tiles.tolist() == [2]
    assert sum(second) == again if again is not None else sum(second) <= 2
    pair.shares_encoder = False
    alone = pair.generate(**inputs, **TOKENS)
    assert torch.equal(output.sequences, alone.sequences)


def test_towers_are_compared_by_their_weights(siblings, guide, target, processor):
    other = copy.deepcopy(siblings[1])
    with torch.no_grad():
        next(other.model.vision_model.parameters()).flatten()[0] += 1
    assert not GuidedVLM(siblings[0], other, processor).shares_encoder
    assert not GuidedVLM(guide, target, processor).shares_encoder


def test_a_guide_that_answers_alone_streams_its_answer(pair_of, single):
    pieces = []

    class Streamer:
        def put(self, value):
            pieces.append(value.flatten().tolist())

        def end(self):
            pieces.append("end")

    output = pair_of(exit_threshold=ALWAYS).generate(**single, **TOKENS, streamer=Streamer())
    assert pieces == [single["input_ids"][0].tolist(), output.sequences[0, -4:].tolist(), "end"]
    assert output.selection is None
    pieces.clear()
    output = pair_of().generate(**single, **TOKENS, streamer=Streamer())
    assert sum(pieces[1:-1], []) == output.sequences[0, -4:].tolist() and output.selection is not None


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "temperature": 0.7}])
def test_the_target_decodes_as_it_is_told(pair_of, batch, options):
    torch.manual_seed(0)
    assert pair_of(max_tiles=1).generate(**batch, **TOKENS, **options).sequences.shape[0] == 3


# Calibration


def test_the_threshold_is_the_lowest_that_is_loyal():
    sureness = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    agrees = torch.tensor([True, True, False, True, True])
    assert choose_threshold(sureness, agrees, 1.0) == pytest.approx(0.8)
    assert choose_threshold(sureness, agrees, 0.5) == pytest.approx(0.5)
    assert choose_threshold(sureness, ~agrees, 1.0) > 1
    tied = torch.tensor([0.9, 0.8, 0.8, 0.6, 0.5])
    assert choose_threshold(tied, agrees, 1.0) == pytest.approx(0.9)


def make_samples(make_image, count):
    return [{"image": make_image(seed, 128, 64), "question": f"what is {seed}?"} for seed in range(count)]


def test_calibration_sets_the_threshold(pair_of, make_image):
    pair = pair_of(max_tiles=1)
    record = pair.calibrate(make_samples(make_image, 24), 0.5, max_new_tokens=1)
    assert record == pair.guidance.calibration and pair.guidance.exit_threshold == record["exit_threshold"]
    assert record["loyalty_ci95"][0] <= record["loyalty"] <= record["loyalty_ci95"][1]
    assert 0 <= record["exits"] <= 1
    strict = pair.calibrate(make_samples(make_image, 24), 1.0, max_new_tokens=1)
    assert strict["exit_threshold"] >= record["exit_threshold"]


@pytest.mark.parametrize(
    "samples, loyalty, complaint",
    [(24, 0.0, r"target_loyalty \(0.0\)"), (24, 1.1, r"target_loyalty"), (19, 0.9, r"samples \(19\)")],
)
def test_bad_calibrations_change_nothing(pair_of, make_image, samples, loyalty, complaint):
    pair = pair_of()
    with pytest.raises(ValueError, match=complaint):
        pair.calibrate(make_samples(make_image, samples), loyalty)
    assert pair.guidance == Guidance()


def test_an_unreadable_sample_changes_nothing(pair_of, make_image):
    pair = pair_of(exit_threshold=0.7)
    with pytest.raises(ValueError, match="sample 22 of 23"):
        pair.calibrate([*make_samples(make_image, 22), {"image": None, "question": "?"}], max_new_tokens=1)
    assert pair.guidance == Guidance(exit_threshold=0.7)


# Saved and loaded


def test_saved_equals_loaded(pair_of, batch, tmp_path):
    pair = pair_of(max_tiles=2, coverage=0.7, view="glance", exit_threshold=0.1)
    pair.save_pretrained(tmp_path)
    loaded = GuidedVLM.from_pretrained(tmp_path)
    assert loaded.guidance == pair.guidance
    one, other = (each.generate(**batch, **TOKENS) for each in (pair, loaded))
    assert torch.equal(one.sequences, other.sequences) and torch.equal(one.confidence, other.confidence)


def test_a_saved_part_is_a_checkpoint_with_its_code(pair_of, tmp_path):
    pair_of().save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "for part in ('guide', 'target'):\n"
        "    model = AutoModelForImageTextToText.from_pretrained(f'{sys.argv[1]}/{part}', trust_remote_code=True)\n"
        "    print(type(model).__name__, type(model).__module__.split('.')[0])\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code, tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split("\n")[:2] == ["QGSASmolVLMForConditionalGeneration transformers_modules"] * 2, done.stderr


def test_a_folder_without_a_pair_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="guidance.json"):
        GuidedVLM.from_pretrained(tmp_path)


# Bad input


@pytest.mark.parametrize(
    "guidance, complaint",
    [
        ({"view": "far"}, r"view \('far'\): choose from dense, selection, glance"),
        ({"scores": "guess"}, r"scores \('guess'\): choose from attention, pointer"),
        ({"prune_layer": 5}, r"prune_layer \(5\) must be in 0 .. 4"),
        ({"retention": 0.0}, r"retention \(0.0\) must be in \(0, 1\]"),
        ({"retention": 1.2}, r"retention \(1.2\)"),
        ({"coverage": 0}, r"coverage \(0\)"),
        ({"max_tiles": -1}, r"max_tiles \(-1\)"),
    ],
)
def test_guidance_out_of_range_is_refused(pair_of, guidance, complaint):
    with pytest.raises(ValueError, match=complaint):
        pair_of(**guidance)


def test_other_tokenizers_are_refused(guide, target, processor):
    other = copy.deepcopy(processor)
    other.tokenizer.add_tokens(["extraordinary"])
    with pytest.raises(ValueError, match=r"same tokenizer, but None is not \(448, 'extraordinary'\)"):
        GuidedVLM(guide, target, (processor, other))


def test_images_for_one_of_the_two_are_refused(pair_of, single, tokenizer):
    text = dict(tokenizer("hello there", return_tensors="pt", add_special_tokens=False))
    text = {name: text[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="to the target only"):
        pair_of().generate(**single, guide_inputs=text, **TOKENS)
    with pytest.raises(ValueError, match="to the guide only"):
        pair_of().generate(**text, guide_inputs=single, **TOKENS)


def test_other_images_are_refused(pair_of, prepare, make_image):
    one = prepare(("how many?", [make_image(2, 64, 128)]))
    two = prepare(("how many?", [make_image(2, 64, 128), make_image(1, 64, 128)]))
    with pytest.raises(ValueError, match="guide_inputs holds 2 images, the target has 1"):
        pair_of().generate(**one, guide_inputs=two, **TOKENS)


def test_several_sequences_are_refused(pair_of, single):
    with pytest.raises(ValueError, match=r"num_return_sequences \(2\) must be 1"):
        pair_of().generate(**single, num_return_sequences=2, do_sample=True)


def test_a_larger_guide_is_warned_of(guide, target, processor, caplog):
    logging.getLogger("transformers").propagate = logging.getLogger("modeling_qgsa").propagate = True
    with caplog.at_level(logging.WARNING):
        GuidedVLM(target, guide, processor)
    assert "is larger than its target" in caplog.text
