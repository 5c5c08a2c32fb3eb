import pytest
import torch

from training.costs.counter import count_flops
from training.evaluation.systems import encode_all, layout_of
from training.methods.peers import PEERS, cdpruner, divprune, fastv, greedy_map, visionzip


@pytest.fixture
def layout(model, batch):
    return layout_of(model.config, batch["input_ids"])


def chosen(options, k):
    """The k best tokens of each sample, as a set."""
    return [set(row.topk(k).indices.tolist()) for row in options["visual_token_scores"]]


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_keeps_its_k_tokens_in_a_batch_as_alone(name, model, batch, layout, prepare, samples):
    budget = {"selection": "after_encoder", "min_visual_tokens": 9, "max_visual_tokens": 9}
    options = PEERS[name](model, batch, layout, 9)
    selection = model.select(**batch, **budget, visual_token_scores=options["visual_token_scores"])
    assert selection.visual_tokens.tolist() == [9, 9, 9] and selection.tiles.tolist() == [16, 4, 8]
    answers = model.generate(**batch, **options, **budget, do_sample=False, max_new_tokens=4)
    for row, sample in enumerate(samples):
        inputs = prepare(sample)
        alone = PEERS[name](model, inputs, layout_of(model.config, inputs["input_ids"]), 9)
        assert chosen(alone, 9)[0] == chosen(options, 9)[row]
        answer = model.generate(**inputs, **alone, **budget, do_sample=False, max_new_tokens=4)
        assert torch.equal(answer[0, -4:], answers[row, -4:])


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_pays_for_every_tile_once(name, model, single):
    budget = {"selection": "after_encoder", "min_visual_tokens": 9, "max_visual_tokens": 9}
    layout = layout_of(model.config, single["input_ids"])
    counted = count_flops(model, single, 3, lambda: PEERS[name](model, single, layout, 9), **budget)
    assert counted["vision"] == count_flops(model, single, 3, selection="dense")["vision"]


def test_fastv_reads_the_attention_of_the_second_layer(make_model, make_dense, single):
    model = make_model(make_dense("smolvlm", "eager"))
    layout = layout_of(model.config, single["input_ids"])
    with torch.no_grad():
        attentions = model(**single, selection="dense", output_attentions=True).attentions
    expected = attentions[1].mean(1)[0, -1, layout.token_positions].flatten()
    assert torch.allclose(fastv(model, single, layout, 9)["visual_token_scores"][0], expected, atol=1e-5)


def test_visionzip_reads_the_attention_of_the_last_but_one_layer(make_model, make_dense, single):
    model = make_model(make_dense("smolvlm", "eager"))
    layout = layout_of(model.config, single["input_ids"])
    with torch.no_grad():
        encoded = model.model.vision_model(single["pixel_values"][0], output_attentions=True)
    received = encoded.attentions[-2].mean((1, 2)).view(17, 4, 2, 4, 2).mean((2, 4)).flatten()
    best = set(received.topk(8).indices.tolist())  # 54 of 64 of nine
    assert best <= chosen(visionzip(model, single, layout, 9), 9)[0]


def test_visionzip_averages_what_it_drops(model, single):
    layout = layout_of(model.config, single["input_ids"])
    features, options = encode_all(model, single), visionzip(model, single, layout, 64)
    changed = (options["image_hidden_states"] != features).any(-1).flatten()
    assert 0 < int(changed.sum()) <= 10
    kept = options["visual_token_scores"][0].view(-1) > 0
    assert int(kept.sum()) == 64 and kept[changed].all()
    dominant = options["visual_token_scores"][0] > 10
    merged = options["image_hidden_states"].flatten(0, 1)[kept & ~dominant]
    # Groups of every size: their mean weighed by size is that of all that is not dominant.
    rest = features.flatten(0, 1)[~dominant]
    assert merged.norm(dim=-1).mean() < rest.norm(dim=-1).mean()


def test_divprune_picks_the_farthest_next(model, batch, layout):
    options = divprune(model, batch, layout, 6)
    features = encode_all(model, batch)[layout.tile_sample == 1].flatten(0, 1)
    unit = torch.nn.functional.normalize(features, dim=-1)
    distance = 1 - unit @ unit.T
    order = options["visual_token_scores"][1].argsort(descending=True)[:6]
    for step in range(1, 6):
        nearest = distance[order[:step]].amin(0).index_fill(0, order[:step], -1)
        assert distance[order[:step], order[step]].amin() == pytest.approx(float(nearest.max()), abs=1e-6)


def test_cdpruner_asks_the_question(model, prepare, make_image):
    image = make_image()
    one, other = (prepare((question, [image])) for question in ("what is red?", "how many cards are there?"))
    layouts = [layout_of(model.config, inputs["input_ids"]) for inputs in (one, other)]
    first, second = (chosen(cdpruner(model, i, layout, 30), 30)[0] for i, layout in zip((one, other), layouts))
    assert first != second
    assert chosen(divprune(model, one, layouts[0], 30), 30) == chosen(divprune(model, other, layouts[1], 30), 30)


def test_greedy_map_makes_the_determinant_largest_step_by_step():
    vectors = torch.randn(8, 5, dtype=torch.float64)
    kernel = vectors @ vectors.T
    picked = []
    for item in greedy_map(kernel, 4).tolist():
        sizes = [-1.0 if i in picked else float(kernel[picked + [i]][:, picked + [i]].det()) for i in range(8)]
        assert sizes[item] == pytest.approx(max(sizes))
        picked.append(item)
