"""The teachers against plain forwards of the model, and the gradient of the answer through the gates."""

import math

import pytest
import torch

import modeling_qgsa.utility_qgsa as utility_qgsa
import training.learning.teachers as teachers
from modeling_qgsa.configuration_qgsa import Budget
from modeling_qgsa.pointer_qgsa import PointedScores
from modeling_qgsa.request_qgsa import Request
from modeling_qgsa.selection_qgsa import positions_to_keep
from modeling_qgsa.utility_qgsa import Reading, read_answers, tile_utility
from training.data.collator import QuestionCollator
from training.learning.teachers import (
    cheapest_sufficient,
    hard_positions,
    neutral_prompt,
    paid_attention,
    visual_attention,
)


ONE_TILE = {"min_tiles": 1, "max_tiles": 1, "min_visual_tokens": 32, "max_visual_tokens": 32}


@pytest.fixture(scope="module")
def questions(make_image):
    """Images of 4 x 4, 1 x 4 and 4 x 2 tiles, and answers of different lengths."""
    return [
        {"image": make_image(3), "question": "what shape is on the red card?", "answer": "star"},
        {"image": make_image(4, 256, 64), "question": "where is it?", "answer": "row 1 column 3"},
        {"image": make_image(5, 64, 128), "question": "is there a red card?", "answer": "no"},
    ]


@pytest.fixture(scope="module")
def labelled(processor, questions):
    return QuestionCollator(processor)(questions)


def encode(model, batch):
    """`(glance, features, prompt)` of a batch, every tile encoded."""
    request = Request.take(model.config, dict(batch))
    with torch.no_grad():
        glance = model.model.glance_and_point(request)
        every = torch.ones(len(glance.layout.is_global), glance.layout.tokens_per_tile, dtype=torch.bool)
        features = model.model.look(glance, request.visual, every)
    return glance, features, request.prompt


def score_all(model, glance, features):
    """The selector's scores of all visual tokens, `(T, P)`."""
    return PointedScores(glance).of_tokens(features, torch.ones_like(glance.layout.is_global))


def embed(model, glance, features, prompt):
    with torch.no_grad():
        every = torch.ones_like(glance.layout.is_global)
        return model.model.embed(prompt.input_ids, glance.layout, features, every)


def variants(layout, prompt, count=12):
    """Random sets of kept visual tokens: the sample of each, and its kept positions."""
    rows = torch.randint(len(prompt.input_ids), (count,))
    keep = [
        positions_to_keep(prompt.attention_mask, layout, torch.rand(layout.token_positions.shape) < share)[row]
        for row, share in zip(rows, torch.rand(count))
    ]
    return rows, torch.stack(keep)


# Log-likelihood of the answer


def test_likelihood_is_that_of_a_plain_forward(model, labelled):
    glance, features, prompt = encode(model, labelled)
    embeds = embed(model, glance, features, prompt)
    rows, keep = variants(glance.layout, prompt)
    with torch.no_grad():
        scores = read_answers(model, rows, keep, embeds, prompt).log_likelihood
        for row, kept, score in zip(rows, keep, scores):
            hidden = model.model.text_model(
                inputs_embeds=embeds[row, kept][None], position_ids=prompt.position_ids[row, kept][None]
            ).last_hidden_state
            chances = model.lm_head(hidden)[0].log_softmax(1)
            ids, labels = prompt.input_ids[row, kept], prompt.labels[row, kept]
            answer = (labels != -100).nonzero()[:, 0]
            assert len(answer) >= 2
            assert score.item() == pytest.approx(chances[answer - 1, ids[answer]].sum().item(), abs=1e-4)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunks_and_order_do_not_matter(chunk, model, labelled, monkeypatch):
    glance, features, prompt = encode(model, labelled)
    embeds = embed(model, glance, features, prompt)
    rows, keep = variants(glance.layout, prompt)
    with torch.no_grad():
        expected = read_answers(model, rows, keep, embeds, prompt).log_likelihood
        monkeypatch.setattr(utility_qgsa, "CHUNK", chunk)
        order = torch.randperm(len(rows))
        shuffled = read_answers(model, rows[order], keep[order], embeds, prompt).log_likelihood
    assert expected.std() > 0.01
    assert torch.allclose(shuffled, expected[order], atol=1e-4)


# Utility of a tile


def test_utility_is_the_likelihood_of_the_model_that_looks_at_this_tile(model, labelled, processor, questions):
    glance, features, prompt = encode(model, labelled)
    layout = glance.layout
    utility = tile_utility(model, glance.layout, features, prompt)
    assert torch.equal(utility.isinf(), layout.is_global)
    for tile in (~layout.is_global).nonzero()[:, 0].tolist():
        row, ordinal = int(layout.tile_sample[tile]), int(layout.tile_ordinal[tile])
        alone = QuestionCollator(processor)([questions[row]])
        count = int((layout.tile_sample == row).sum())
        scores = torch.zeros(count, 16)
        scores[ordinal] = 1.0
        with torch.no_grad():
            outputs = model(**alone, visual_token_scores=scores.flatten()[None], **ONE_TILE)
        tiles = torch.zeros(count, dtype=torch.bool)
        tiles[[ordinal, count - 1]] = True
        assert torch.equal(outputs.selection.kept_tiles[0], tiles)
        assert torch.equal(outputs.selection.kept_tokens[0], tiles.repeat_interleave(16))
        tokens = int((alone["labels"] != -100).sum())
        assert utility[tile].item() == pytest.approx(-tokens * outputs.loss.item(), abs=1e-3)


def test_utility_differs_between_tiles_and_carries_no_gradient(model, labelled):
    glance, features, prompt = encode(model, labelled)
    utility = tile_utility(model, glance.layout, features, prompt)
    assert not utility.requires_grad
    assert utility[:16].std() > 1e-3


def test_utility_of_single_tiles_is_nowhere_finite(model, processor, questions):
    batch = QuestionCollator(processor, image_kwargs={"do_image_splitting": False})(questions)
    glance, features, prompt = encode(model, batch)
    assert tile_utility(model, glance.layout, features, prompt).tolist() == [float("-inf")] * 3


# Attention to visual tokens


@pytest.fixture
def attentive(model, labelled):
    """Runs `visual_attention` on the batch."""
    glance, features, prompt = encode(model, labelled)
    return lambda samples: visual_attention(model, glance, features, prompt, samples)


@pytest.mark.parametrize("samples", [1, 3])
def test_attention_is_that_of_a_plain_forward(samples, attentive, make_model, make_dense, processor, questions):
    found = attentive(samples)
    assert found.dtype == torch.float32 and not found.requires_grad
    eager, start = make_model(make_dense("idefics3", "eager")), 0
    for row, question in enumerate(questions):
        alone = QuestionCollator(processor)([question])
        visual = alone["input_ids"][0] == eager.config.image_token_id
        count = int(visual.sum()) // 16
        expected = torch.zeros(count, 16)
        if row < samples:
            asking = alone["question_mask"][0].bool() & (alone["labels"][0] == -100)
            asking[(alone["labels"][0] != -100).nonzero()[:, 0] - 1] = True
            with torch.no_grad():
                layers = eager(**alone, selection="dense", output_attentions=True).attentions
            expected = sum(layer[0].mean(0)[asking].sum(0) for layer in layers)[visual].view(count, 16)
        assert torch.allclose(found[start : start + count], expected, atol=1e-4)
        start += count
    assert start == len(found)


def test_the_implementation_of_attention_is_never_switched(attentive, model):
    """Attention is read in addition to the model's own pass, in every layer."""
    text_model, seen = model.model.text_model, []
    hooks = [
        layer.register_forward_hook(lambda *_: seen.append(text_model.config._attn_implementation))
        for layer in text_model.layers
    ]
    attentive(3)
    for hook in hooks:
        hook.remove()
    assert set(seen) == {"sdpa"} == {text_model.config._attn_implementation}


# The cheapest budget that suffices


@pytest.fixture
def cheapest(model, labelled):
    """Runs `cheapest_sufficient` on the batch with the selector's own scores."""
    glance, features, prompt = encode(model, labelled)

    def run(tolerance, **overrides):
        budget = Budget.of(model.config, **overrides)
        with torch.no_grad():
            scores = PointedScores(glance).of_tokens(features, torch.ones_like(glance.layout.is_global))
        return cheapest_sufficient(model, glance, features, scores, prompt, budget, tolerance)

    return run


@pytest.mark.parametrize("selection", ["before_encoder", "after_encoder"])
def test_everything_suffices_at_a_huge_tolerance_and_nothing_at_a_negative_one(selection, cheapest):
    assert cheapest(1e9, selection=selection).tolist() == [0, 0, 0]
    assert cheapest(-1e9, selection=selection).tolist() == [8, 8, 8]


def test_the_cheapest_level_is_the_first_that_hard_selection_answers_as_well_with(
    model, processor, questions, cheapest
):
    for tolerance in (0.0, 1e-4, 1e-3):
        found = cheapest(tolerance)
        for question, level in zip(questions, found.tolist()):
            alone = QuestionCollator(processor)([question])
            with torch.no_grad():
                dense = math.exp(-model(**alone, selection="dense").loss.item())
                enough = []
                for complexity in torch.linspace(0, 1, 9):
                    m, k = (int(count) for count in Budget.of(model.config).resolve(complexity))
                    exactly = {"min_tiles": m, "max_tiles": m, "min_visual_tokens": k, "max_visual_tokens": k}
                    enough.append(math.exp(-model(**alone, **exactly).loss.item()) >= dense - tolerance)
            assert level == (enough.index(True) if any(enough) else 8)


def test_a_long_answer_is_held_to_the_same_tolerance(model, processor, questions, monkeypatch):
    """Many tokens of 0.85 each instead of 0.9 are as far below dense as one is, though the product is not."""
    question = {**questions[0], "answer": "red blue green red blue green red blue green"}
    glance, features, prompt = encode(model, QuestionCollator(processor)([question]))
    tokens = int((prompt.labels[:, 1:] != -100).sum())
    assert tokens > 9
    likelihoods = tokens * torch.tensor([0.9] + [0.75] * 4 + [0.85] * 5).log()
    monkeypatch.setattr(teachers, "read_answers", lambda *args: Reading(likelihoods, None))
    budget = Budget.of(model.config)
    with torch.no_grad():
        scores = score_all(model, glance, features)
    for tolerance, level in ((0.01, 8), (0.1, 4), (0.2, 0)):
        assert cheapest_sufficient(model, glance, features, scores, prompt, budget, tolerance).tolist() == [level]


# The gradient of the answer


@pytest.mark.parametrize(
    "name", ["relevance.weight", "tile_key.weight", "glance_key.weight", "query.weight", "question_projection.weight"]
)
def test_the_answer_loss_has_its_gradient_in_the_selector(name, make_model, labelled):
    model = make_model(max_visual_tokens=24).double().train()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in labelled.items()}
    weight = model.model.selector.get_parameter(name)

    def loss():
        torch.manual_seed(3)  # the noise of the gates
        return model(**batch, gumbel_temperature=2.0).loss

    loss().backward()
    gradient = weight.grad.clone()
    direction = gradient / gradient.norm()
    step, losses = 3e-3 / max(1.0, float(gradient.norm())), []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
            losses.append(loss().item())
            weight.sub_(sign * step * direction)
    slope = (losses[0] - losses[1]) / (2 * step)
    assert gradient.norm() > 1e-5
    assert slope == pytest.approx(gradient.norm().item(), rel=0.1)


def test_the_noise_of_the_gates_is_torchs(make_model, labelled):
    model = make_model().train()
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(**labelled).loss.item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("selection", ["before_encoder", "after_encoder"])
@pytest.mark.parametrize("complexity", [0.0, 0.4, 1.0])
def test_hard_positions_are_what_inference_keeps(selection, complexity, model, labelled):
    glance, features, prompt = encode(model, labelled)
    budget = Budget(selection, 8, 40, 0, 5)
    with torch.no_grad():
        scores = PointedScores(glance).of_tokens(features, torch.ones_like(glance.layout.is_global))
    keep = hard_positions(model, glance, scores, prompt, budget, torch.full_like(glance.complexity, complexity))
    m, k = (int(value) for value in budget.resolve(torch.tensor(complexity)))
    fixed = {"min_tiles": m, "max_tiles": m, "min_visual_tokens": k, "max_visual_tokens": k}
    with torch.no_grad():
        indices = model(**labelled, selection=selection, **fixed).selection.keep_indices
    for row, kept in zip(keep, indices):
        assert row.nonzero()[:, 0].tolist() == kept[kept >= 0].tolist()


# Attention relative to a neutral question


def test_the_neutral_prompt_asks_something_else_and_answers_nothing(model, labelled, tokenizer):
    glance, _, prompt = encode(model, labelled)
    ids = tokenizer("what is it?", add_special_tokens=False)["input_ids"]
    neutral = neutral_prompt(prompt, glance, tuple(ids))
    for row in range(3):
        words = glance.question_mask[row].nonzero()[:, 0]
        length = min(len(ids), len(words))
        assert neutral.input_ids[row, words[:length]].tolist() == ids[:length]
        assert not neutral.attention_mask[row, words[length:]].any()
        answer = prompt.labels[row] != -100
        assert not neutral.attention_mask[row, answer].any()
        assert (neutral.labels[row] != -100).sum() == 1  # where the first token would be predicted
        rest = ~glance.question_mask[row] & ~answer
        assert torch.equal(neutral.input_ids[row, rest], prompt.input_ids[row, rest])
        assert torch.equal(neutral.attention_mask[row, rest], prompt.attention_mask[row, rest])
    assert (prompt.labels != -100).sum() > 3, "the prompt itself is left as it is"


def test_attention_is_divided_by_that_of_the_neutral_question(model, labelled, tokenizer):
    glance, features, prompt = encode(model, labelled)
    ids = tuple(tokenizer("what is it?", add_special_tokens=False)["input_ids"])
    usual = paid_attention(model, glance, features, neutral_prompt(prompt, glance, ids), 3)
    paid = paid_attention(model, glance, features, prompt, 3)
    found = visual_attention(model, glance, features, prompt, 3, ids)
    assert torch.allclose(found * (usual + 0.1 * usual.mean()), paid, atol=1e-5)
    assert not torch.allclose(found / found.sum(), paid / paid.sum(), atol=1e-4)
    asked = visual_attention(model, glance, features, prompt, 1, ids)
    assert asked[:17].any() and not asked[17:].any()
