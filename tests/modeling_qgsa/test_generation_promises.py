"""What transformers promises of every `generate`, on stock and on every variant.

Its own tests of this (`tests/generation/test_utils.py`) are not in its source distribution, see `make upstream`.
"""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from modeling_qgsa.compat_qgsa import CACHE


NEW = 5
KINDS = ("stock", "dense", "before_encoder", "blocks", "after_encoder")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def subject(kind, make_dense, make_model):
    return (
        make_dense("smolvlm", "eager")
        if kind == "stock"
        else make_model(make_dense("smolvlm", "eager"), selection=kind)
    )


@pytest.fixture(scope="module")
def inputs(kind, batch, stock_inputs):
    return stock_inputs(batch) if kind == "stock" else batch


@pytest.fixture(scope="module")
def asked(kind, single, stock_inputs):
    return stock_inputs(single) if kind == "stock" else single


@pytest.fixture(scope="module")
def kept(kind, subject, inputs):
    """Number of positions that go through the text model."""
    return inputs["input_ids"].shape[1] if kind in KINDS[:2] else subject.select(**inputs).keep_indices.shape[1]


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_outputs_as_a_dictionary(way, subject, inputs, kept):
    options = WAYS[way]
    rows, returned = (3 * options.get(name, 1) for name in ("num_beams", "num_return_sequences"))
    output = subject.generate(
        **inputs,
        **options,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    assert output.sequences.shape == (returned, inputs["input_ids"].shape[1] + NEW)
    vocabulary = subject.config.text_config.vocab_size
    for name in ("scores", "logits"):
        assert [tuple(each.shape) for each in output[name]] == [(rows, vocabulary)] * NEW
    for name, last in (("attentions", None), ("hidden_states", 32)):
        assert len(output[name]) == NEW
        for step, layers in enumerate(output[name]):
            assert len(layers) == 2 + (last is not None)
            queries = kept if step == 0 else 1
            expected = (rows, queries, last) if last else (rows, 4, queries, kept + step)
            assert all(tuple(layer.shape) == expected for layer in layers)
    assert output[CACHE].get_seq_length() == kept + NEW - 1


def test_transition_scores(subject, inputs):
    options = {"return_dict_in_generate": True, "output_scores": True}
    output = subject.generate(**inputs, max_new_tokens=NEW, **options)
    found = subject.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    chosen = output.sequences[:, -NEW:]
    expected = torch.stack(output.scores, 1).log_softmax(-1).gather(2, chosen[..., None])[..., 0]
    assert torch.allclose(found, expected, atol=1e-5)


def test_an_answer_goes_on_from_its_cache(subject, asked):
    expected = subject.generate(**asked, max_new_tokens=2 * NEW)
    first = subject.generate(**asked, max_new_tokens=NEW, return_dict_in_generate=True)
    rest = {"attention_mask": torch.ones_like(first.sequences), CACHE: first[CACHE]}
    assert torch.equal(subject.generate(first.sequences, **rest, max_new_tokens=NEW), expected)


def test_an_answer_of_a_batch_goes_on_from_its_cache(subject, inputs):
    expected = subject.generate(**inputs, max_new_tokens=2 * NEW)
    first = subject.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True)
    attention_mask = torch.cat([inputs["attention_mask"], torch.ones_like(first.sequences[:, -NEW:])], 1)
    rest = {"attention_mask": attention_mask, CACHE: first[CACHE]}
    assert torch.equal(subject.generate(first.sequences, **rest, max_new_tokens=NEW), expected)


def test_logits_to_keep_changes_nothing(subject, inputs):
    expected = subject.generate(**inputs, max_new_tokens=NEW)
    assert torch.equal(subject.generate(**inputs, max_new_tokens=NEW, logits_to_keep=0), expected)


class Seen(LogitsProcessor):
    def __init__(self):
        self.ids = []

    def __call__(self, input_ids, scores):
        self.ids.append(input_ids.clone())
        return scores


class After(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_processors_and_criteria_read_the_whole_text(subject, inputs):
    """Prompt and answer, in prompt positions."""
    seen, length = Seen(), inputs["input_ids"].shape[1]
    ids = subject.generate(
        **inputs,
        max_new_tokens=2 * NEW,
        logits_processor=LogitsProcessorList([seen]),
        stopping_criteria=StoppingCriteriaList([After(length + 3)]),
    )
    assert ids.shape[1] == length + 3
    assert len(seen.ids) == 3
    for step, each in enumerate(seen.ids):
        assert torch.equal(each, ids[:, : length + step])


def test_an_answer_that_ends_is_padded(subject, inputs):
    answers = subject.generate(**inputs, max_new_tokens=NEW)[:, -NEW:]
    end = int(answers[0, 1])
    ids = subject.generate(**inputs, max_new_tokens=NEW, eos_token_id=end)[:, inputs["input_ids"].shape[1] :]
    for row, answer in zip(ids.tolist(), answers.tolist()):
        stop = answer.index(end) + 1 if end in answer else NEW
        assert row[:stop] == answer[:stop]
        assert set(row[stop:]) <= {subject.generation_config.pad_token_id}


class Streamed:
    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, ids):
        self.ids += ids.flatten().tolist()

    def end(self):
        self.ended = True


def test_a_streamer_gets_prompt_and_answer(subject, asked):
    streamer = Streamed()
    ids = subject.generate(**asked, max_new_tokens=NEW, streamer=streamer)
    assert streamer.ids == ids[0].tolist() and streamer.ended


def test_prompt_lookup_is_used_or_refused(kind, subject, asked):
    options = {"max_new_tokens": NEW, "prompt_lookup_num_tokens": 2}
    if kind in KINDS[:2]:
        assert torch.equal(subject.generate(**asked, **options), subject.generate(**asked, max_new_tokens=NEW))
    else:
        with pytest.raises(ValueError, match='reads the whole prompt.*use selection="dense"'):
            subject.generate(**asked, **options)


def test_generation_leaves_nothing_behind(subject, inputs):
    options = dict(vars(subject.generation_config))
    first = subject.generate(**inputs, max_new_tokens=NEW, do_sample=False, num_beams=2)
    assert vars(subject.generation_config) == options
    assert torch.equal(subject.generate(**inputs, max_new_tokens=NEW, do_sample=False, num_beams=2), first)
