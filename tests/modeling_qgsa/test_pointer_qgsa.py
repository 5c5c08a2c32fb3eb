"""The trained selector, the complexity estimator, and scores given by a caller."""

import pytest
import torch
from handmade import image_block, prompts, read

from modeling_qgsa import QGSAConfig
from modeling_qgsa.pointer_qgsa import GivenScores, complexity_at
from modeling_qgsa.selector_qgsa import ComplexityEstimator, QuestionGuidedSelector


CONFIG = QGSAConfig(
    vision_config={"image_size": 64, "patch_size": 8},
    text_config={"model_type": "llama", "hidden_size": 24, "num_attention_heads": 2},
    scale_factor=2,
    selector_hidden_size=16,
    selector_heads=2,
    max_question_tokens=5,
    complexity_levels=5,
    attn_implementation="sdpa",
)


@pytest.fixture
def fresh_selector():
    return QuestionGuidedSelector(CONFIG)


@pytest.fixture
def selector(fresh_selector):
    """A selector that has learnt places."""
    with torch.no_grad():
        fresh_selector.cell_position.normal_()
        fresh_selector.word_position.normal_()
    return fresh_selector


def test_given_scores_are_read_by_tile():
    layout = read(prompts([1] + image_block(1, 1, 4), [1] + image_block(0, 0, 4)))
    scores = torch.arange(16.0).view(2, 8)
    assert GivenScores.of(scores, layout).scores.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    transposed = scores.t().contiguous().t()
    assert torch.equal(GivenScores.of(transposed, layout).scores, GivenScores.of(scores, layout).scores)
    with pytest.raises(ValueError, match=r"shape \(2, 7\): the prompts hold 2 samples of at most 8 visual tokens"):
        GivenScores.of(scores[:, :7], layout)
    with pytest.raises(ValueError, match=r"shape \(8,\)"):
        GivenScores.of(scores[0], layout)


def test_selector_gives_log_probabilities(selector):
    relevance, question = selector(torch.randn(3, 4, 24), torch.ones(3, 4).bool(), torch.randn(3, 16, 24))
    assert relevance.shape == (3, 16) and question.shape == (3, 24)
    assert torch.allclose(relevance.exp().sum(1), torch.ones(3))


def test_selector_does_not_see_where_the_question_is_padded(selector):
    words, glance = torch.randn(1, 3, 24), torch.randn(1, 16, 24)
    expected = selector(words, torch.ones(1, 3).bool(), glance)
    noise = torch.randn(1, 2, 24)
    for padded, mask in (
        (torch.cat([noise, words], 1), [0, 0, 1, 1, 1]),
        (torch.cat([words, noise], 1), [1, 1, 1, 0, 0]),
        (torch.cat([words[:, :1], noise, words[:, 1:]], 1), [1, 0, 0, 1, 1]),
    ):
        got = selector(padded, torch.tensor([mask]).bool(), glance)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, expected))
    mixed = torch.cat([torch.cat([noise, words], 1), torch.randn(1, 5, 24)])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    got = selector(mixed, mask, glance.expand(2, -1, -1))
    assert all(torch.allclose(a[:1], b, atol=1e-6) for a, b in zip(got, expected))


def test_selector_reads_the_last_words_of_a_long_question_in_their_order(selector):
    words, glance = torch.randn(1, 9, 24), torch.randn(1, 16, 24)
    everything = torch.ones(1, 9).bool()
    relevance, _ = selector(words, everything, glance)
    changed = words.clone()
    changed[:, :4] += 1
    assert torch.equal(selector(changed, everything, glance)[0], relevance)
    changed[:, 4] += torch.randn(24)
    assert not torch.allclose(selector(changed, everything, glance)[0], relevance)
    assert not torch.allclose(selector(words.flip(1)[:, :5], everything[:, :5], glance)[0], relevance)


def test_selector_scores_glance_and_tiles_by_keys_of_their_own(selector):
    features, state = torch.randn(2, 16, 24), torch.randn(2, 24)
    is_global = torch.tensor([False, True])
    before = selector.match_tokens(state, features, is_global)
    with torch.no_grad():
        selector.tile_key.weight.mul_(-2)
    after = selector.match_tokens(state, features, is_global)
    assert not torch.allclose(before[0], after[0]) and torch.equal(before[1], after[1])


def test_a_fresh_selector_matches_words_with_the_tokens_that_are_like_them(fresh_selector):
    word, features = torch.randn(2, 24), torch.randn(2, 16, 24)
    features[[0, 1], [5, 9]] = word
    match = fresh_selector.match_tokens(word, features, torch.tensor([False, True]))
    assert match.dtype == torch.float32 and match.argmax(1).tolist() == [5, 9]


def test_a_fresh_selector_knows_no_places(fresh_selector):
    selector = fresh_selector
    words, mask, glance = torch.randn(1, 4, 24), torch.ones(1, 4).bool(), torch.randn(1, 16, 24)
    order = torch.randperm(16)
    relevance, _ = selector(words, mask, glance)
    assert torch.allclose(selector(words, mask, glance[:, order])[0], relevance[:, order], atol=1e-5)
    with torch.no_grad():
        selector.cell_position.normal_()
    assert not torch.allclose(selector(words, mask, glance[:, order])[0], selector(words, mask, glance)[0][:, order])


def test_estimator_reads_the_question_and_the_glance_and_no_padding():
    estimator = ComplexityEstimator(CONFIG)
    words, glance, mask = torch.randn(3, 6, 24), torch.randn(3, 16, 24), torch.rand(3, 6) < 0.7
    mask[:, 0] = True
    logits = estimator(words, mask, glance)
    assert logits.shape == (3, 5) and logits.dtype == torch.float32
    assert torch.equal(estimator(words.masked_fill(~mask[..., None], 7.0), mask, glance), logits)
    assert not torch.allclose(estimator(words.masked_fill(mask[..., None], 7.0), mask, glance), logits)
    assert not torch.allclose(estimator(words, mask, glance.flip(0)), logits)


def test_complexity_is_the_lowest_that_suffices_as_often_as_asked():
    logits = torch.tensor([[0.5, 0.25, 0.0, 0.2, 0.05], [0.0, 0.0, 1.0, 0.0, 0.0]]).log()
    for quantile, expected in ((0.4, 0), (0.6, 0.25), (0.8, 0.75), (0.94, 0.75), (0.97, 1.0)):
        assert complexity_at(logits, quantile).tolist() == [expected, 0.5]
    sure = complexity_at(torch.randn(50, 9), 1.0)
    assert (sure == 1).all(), "rounding of the sum must not lead past the highest level"
