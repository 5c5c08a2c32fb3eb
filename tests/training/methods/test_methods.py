"""Every method of the list: the k tokens it keeps, what it pays, and that it follows its paper."""

import pytest
import torch

from modeling_qgsa.configuration_qgsa import Budget
from modeling_qgsa.layout_qgsa import VisualLayout
from training.costs.counter import count_flops
from training.methods import METHODS
from training.methods.cdpruner import greedy_map
from training.methods.method import MethodInputs, encode_all
from training.methods.vispruner import drop_duplicates


AFTER_ENCODER = [name for name, method in METHODS.items() if method.selection == "after_encoder"]
CONTROLS = [name for name in METHODS if name not in AFTER_ENCODER]
SEEDLESS = [name for name in METHODS if not name.startswith("random")]


@pytest.fixture
def layout(model, batch):
    return VisualLayout.of(model.config, batch["input_ids"])


def options_of(name, model, inputs, k, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return METHODS[name].options(model, inputs, VisualLayout.of(model.config, inputs["input_ids"]), k, generator)


def fixed(name, tokens):
    """The budget of exactly `tokens` visual tokens, in the method's selection."""
    return {"selection": METHODS[name].selection, "min_visual_tokens": tokens, "max_visual_tokens": tokens}


def chosen(options, k):
    """The k best tokens of each sample, as a set."""
    return [set(row.topk(k).indices.tolist()) for row in options["visual_token_scores"]]


# The contract, for every method


@pytest.mark.parametrize("name", METHODS)
def test_a_method_keeps_its_k_tokens(name, model, batch):
    options = options_of(name, model, batch, 9)
    scores = options["visual_token_scores"]
    assert scores.shape == (3, 17 * 16) and scores.dtype == torch.float32
    expected = {"image_hidden_states": name in AFTER_ENCODER, "prune_layer": METHODS[name].prune_layer is not None}
    assert set(options) - {"visual_token_scores"} == {key for key, given in expected.items() if given}
    selection = model.select(**batch, **fixed(name, 9), min_tiles=2, max_tiles=2, visual_token_scores=scores)
    assert selection.visual_tokens.tolist() == [9, 9, 9]
    assert selection.tiles.tolist() == ([16, 4, 8] if name in AFTER_ENCODER else [2, 2, 2])


@pytest.mark.parametrize("name", SEEDLESS)
def test_a_method_keeps_its_k_tokens_in_a_batch_as_alone(name, model, batch, prepare, samples):
    def ask(inputs):
        options = options_of(name, model, inputs, 9) | fixed(name, 9)
        output = model.generate(**inputs, **options, do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
        return output.sequences[:, -4:].tolist(), [
            row.nonzero()[:, 0].tolist() for row in output.selection.kept_tokens
        ]

    together = ask(batch)
    for row, sample in enumerate(samples):
        (answer,), (kept,) = ask(prepare(sample))
        assert len(kept) == 9
        assert (answer, kept) == (together[0][row], together[1][row])


@pytest.mark.parametrize("name", AFTER_ENCODER)
@pytest.mark.parametrize("budget", ["fixed", "own"])
def test_a_method_pays_for_every_tile_once(name, budget, model, single):
    """Also if k depends on the question, which takes a look at the glance."""
    options = fixed(name, 9) if budget == "fixed" else {"selection": "after_encoder"}
    k = 9 if budget == "fixed" else Budget.of(model.config, **options)
    counted = count_flops(model, single, 3, lambda: options_of(name, model, single, k), **options)
    assert counted["vision"] == count_flops(model, single, 3, selection="dense")["vision"]


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_pays_for_no_tile(name, model, single, tiles_encoded):
    with tiles_encoded(model) as counts:
        options_of(name, model, single, Budget.of(model.config))
    assert counts == []


@pytest.mark.parametrize("name", METHODS)
def test_given_features_make_no_difference(name, model, batch):
    features = encode_all(model, batch)
    alone, given = (
        options_of(name, model, inputs, 9) for inputs in (batch, {**batch, "image_hidden_states": features})
    )
    assert alone.pop("prune_layer", None) == given.pop("prune_layer", None)
    assert all(torch.allclose(alone[key], given[key], atol=1e-6) for key in alone)


@pytest.mark.parametrize("name", ["visionzip", "divprune", "cdpruner", "vispruner"])
def test_own_budgets_follow_the_question(name, model, batch, layout):
    """Methods that pick a number of tokens pick as many as the model is going to keep."""
    budget = Budget.of(model.config, selection="after_encoder")
    options = options_of(name, model, batch, budget)
    selection = model.select(**batch, selection="after_encoder")
    assert selection.visual_tokens.tolist() == (options["visual_token_scores"] > 0).sum(1).tolist()
    assert MethodInputs(model, batch, layout, budget).k == selection.visual_tokens.tolist()
    low, high = budget.min_visual_tokens, budget.max_visual_tokens
    assert any(low < k < high for k in selection.visual_tokens.tolist()), "neither bound explains it"


@pytest.mark.parametrize("name", METHODS)
def test_more_tokens_than_there_are_keeps_all(name, model, prepare, make_image):
    inputs = prepare(("what is red?", [make_image()]), do_image_splitting=False)
    for k in (16, 40):
        options = options_of(name, model, inputs, k)
        selection = model.select(**inputs, **fixed(name, k), visual_token_scores=options["visual_token_scores"])
        assert selection.visual_tokens.tolist() == [16]


# The controls


@pytest.mark.parametrize("name", CONTROLS)
def test_scores_of_controls_have_a_place_for_every_visual_token(name, model, batch):
    scores = options_of(name, model, batch, 9)["visual_token_scores"]
    assert scores.shape == (3, 17 * 16)
    with torch.no_grad():
        model(**batch, visual_token_scores=scores)


@pytest.mark.parametrize("name", ["random", "random-tiles"])
def test_random_scores_differ_from_batch_to_batch_and_not_from_run_to_run(name, model, batch, layout):
    runs = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(4)
        runs.append([METHODS[name].options(model, batch, layout, 9, generator) for _ in range(2)])
    (first, second), (again, _) = ([each["visual_token_scores"] for each in run] for run in runs)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_random_scores_are_drawn_as_one_row_per_sample(model, batch, layout):
    """The stream that committed results were drawn from."""
    drawn = torch.rand(3, 17 * 16, generator=torch.Generator().manual_seed(4))
    scores = options_of("random", model, batch, 9)["visual_token_scores"]
    own = torch.arange(17 * 16) < 16 * torch.bincount(layout.tile_sample)[:, None]
    assert torch.equal(scores[own], drawn[own]) and not scores[~own].any()


def test_random_tiles_keeps_the_glance_and_whole_tiles(model, batch, layout):
    options = options_of("random-tiles", model, batch, 48)
    selection = model.select(**batch, **options, **fixed("random-tiles", 48), min_tiles=2, max_tiles=2)
    whole = selection.kept_tokens.view(3, 17, 16)
    assert torch.equal(whole.any(2), whole.all(2)) and whole.all(2).sum(1).tolist() == [3, 3, 3]
    glances = layout.tile_ordinal[layout.is_global]
    assert whole[torch.arange(3), glances].all()
    assert torch.equal(whole.all(2), selection.kept_tiles), "what is encoded is kept"
    seeds = {tuple(chosen(options_of("random-tiles", model, batch, 48, seed), 48)[0]) for seed in range(8)}
    assert len(seeds) > 4


def test_centre_looks_at_the_tiles_in_the_middle(model, batch):
    scores = options_of("centre", model, batch, 64)["visual_token_scores"]
    selection = model.select(
        **batch,
        visual_token_scores=scores,
        min_tiles=4,
        max_tiles=4,
        min_visual_tokens=64,
        max_visual_tokens=64,
    )
    assert selection.kept_tiles[0].nonzero()[:, 0].tolist() == [5, 6, 9, 10, 16]
    assert selection.kept_tokens[0].view(17, 16)[[5, 6, 9, 10]].all()  # the glance comes last
    two = model.select(**batch, visual_token_scores=scores, min_tiles=2, max_tiles=2)
    assert two.kept_tiles[1].nonzero()[:, 0].tolist() == [1, 2, 4]  # of a row of four


# The published methods


def received_attention(model, single):
    """The attention that each token receives in the encoder's last but one layer, `(17 * 16,)`, by transformers."""
    with torch.no_grad():
        encoded = model.model.vision_model(single["pixel_values"][0], output_attentions=True)
    return encoded.attentions[-2].mean((1, 2)).view(17, 4, 2, 4, 2).mean((2, 4)).flatten()


def test_fastv_reads_the_attention_of_the_second_layer(make_model, make_dense, single):
    model = make_model(make_dense("smolvlm", "eager"))
    layout = VisualLayout.of(model.config, single["input_ids"])
    with torch.no_grad():
        attentions = model(**single, selection="dense", output_attentions=True).attentions
    expected = attentions[1].mean(1)[0, -1, layout.token_positions].flatten()
    options = options_of("fastv", model, single, 9)
    assert torch.allclose(options["visual_token_scores"][0], expected, atol=1e-5)
    assert options["prune_layer"] == 2  # behind it, as published


def test_visionzip_reads_the_attention_of_the_last_but_one_layer(make_model, make_dense, single):
    model = make_model(make_dense("smolvlm", "eager"))
    best = set(received_attention(model, single).topk(8).indices.tolist())  # 54 of 64 of nine
    assert best <= chosen(options_of("visionzip", model, single, 9), 9)[0]


def test_visionzip_averages_what_it_drops(model, single):
    features, options = encode_all(model, single), options_of("visionzip", model, single, 64)
    changed = (options["image_hidden_states"] != features).any(-1).flatten()
    assert 0 < int(changed.sum()) <= 10
    kept = options["visual_token_scores"][0].view(-1) > 0
    assert int(kept.sum()) == 64 and kept[changed].all()
    dominant = options["visual_token_scores"][0] > 10
    merged = options["image_hidden_states"].flatten(0, 1)[kept & ~dominant]
    # Groups of every size: their mean, weighted by size, is that of all tokens that are not dominant.
    rest = features.flatten(0, 1)[~dominant]
    assert merged.norm(dim=-1).mean() < rest.norm(dim=-1).mean()


def test_divprune_picks_the_farthest_next(model, batch, layout):
    options = options_of("divprune", model, batch, 6)
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
    first, second = (chosen(options_of("cdpruner", model, inputs, 30), 30)[0] for inputs in (one, other))
    assert first != second
    same = [chosen(options_of("divprune", model, inputs, 30), 30) for inputs in (one, other)]
    assert same[0] == same[1]


def test_greedy_map_makes_the_determinant_largest_step_by_step():
    vectors = torch.randn(8, 5, dtype=torch.float64)
    kernel = vectors @ vectors.T
    picked = []
    for item in greedy_map(kernel, 4).tolist():
        sizes = [-1.0 if i in picked else float(kernel[picked + [i]][:, picked + [i]].det()) for i in range(8)]
        assert sizes[item] == pytest.approx(max(sizes))
        picked.append(item)


def test_vispruner_keeps_half_of_its_tokens_by_attention(make_model, make_dense, single):
    model = make_model(make_dense("smolvlm", "eager"))
    order = options_of("vispruner", model, single, 9)["visual_token_scores"][0].argsort(descending=True)[:9]
    important = received_attention(model, single).argsort(descending=True)
    assert order[:4].tolist() == important[:4].tolist()
    assert not set(order[4:].tolist()) & set(important[:4].tolist())
    unit = torch.nn.functional.normalize(encode_all(model, single).flatten(0, 1), dim=-1)
    similarity = (unit @ unit.T).fill_diagonal_(-1)
    distinct, most_attended = (similarity[rows][:, rows].amax(1).mean() for rows in (order[4:], important[4:9]))
    assert distinct < most_attended, "those that are left resemble each other less than the next by attention"


def test_vispruner_drops_what_resembles_its_neighbours():
    """Six tokens, of which those at even places (10, 12, 14) are compared with those at odd places (11, 13, 15)."""
    similarity = torch.zeros(16, 16)
    for one, other, value in ((10, 13, 0.9), (12, 15, 0.1), (14, 11, 0.5), (10, 12, 1.0), (11, 13, 1.0)):
        similarity[one, other] = similarity[other, one] = value
    rest = torch.arange(10, 16)
    assert drop_duplicates(similarity, rest, 6).tolist() == rest.tolist()
    assert drop_duplicates(similarity, rest, 5).tolist() == [14, 12, 11, 13, 15]
    assert drop_duplicates(similarity, rest, 4).tolist() == [12, 11, 13, 15]
    # The first round drops all that are at even places, the second compares 11 and 15 with 13.
    assert drop_duplicates(similarity, rest, 2).tolist() == [15, 13]


def test_vispruner_drops_at_most_eight_at_a_time():
    """Of 18 tokens, 9 at even places, two rounds are needed to drop 9: the first leaves the most distinct one."""
    similarity = torch.zeros(18, 18)
    even = torch.arange(0, 18, 2)
    similarity[even, even + 1] = torch.linspace(0.9, 0.1, 9)
    once = drop_duplicates(similarity, torch.arange(18), 10)
    assert once.tolist() == [16, *range(1, 18, 2)]
    # Second round: 16, 3, 7, 11, 15 against 1, 5, 9, 13, 17. Only 16 resembles one of them, 17.
    assert drop_duplicates(similarity, torch.arange(18), 9).tolist() == [3, 7, 11, 15, 1, 5, 9, 13, 17]
