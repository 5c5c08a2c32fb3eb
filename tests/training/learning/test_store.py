"""The store of tensors: one maker, bounded, whole files only, several processes at once; and the features in it."""

import copy
import multiprocessing

import pytest
import torch

from modeling_qgsa.compat_qgsa import features_in
from training.data.cards import Cards
from training.data.collator import QuestionCollator
from training.learning.feature_cache import open_feature_cache, with_features
from training.learning.store import TensorStore, digest


MAKER = {"model": "a", "processor": "b"}


def size_of(folder):
    return sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))


def fill(folder, start, count, max_bytes):
    store = TensorStore(folder, MAKER, max_bytes)
    for number in range(start, start + count):
        store.put(digest(torch.tensor(number)), torch.full((100,), float(number)))


def test_what_was_put_is_got(tmp_path):
    store = TensorStore(tmp_path / "store", MAKER, 10**6)
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        tensor, key = torch.randn(3, 4).to(dtype), f"{number}abc"
        assert store.get(key) is None
        store.put(key, tensor)
        found = TensorStore(tmp_path / "store", MAKER, 10**6).get(key)
        assert torch.equal(found, tensor) and found.dtype == dtype


@pytest.mark.parametrize("maker", [{"model": "x", "processor": "b"}, {"model": "a"}, MAKER | {"dtype": "c"}])
def test_a_store_of_another_maker_is_refused_and_left_as_it_is(maker, tmp_path):
    TensorStore(tmp_path, MAKER, 10**6).put("abc", torch.ones(3))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="was made with"):
        TensorStore(tmp_path, maker, 10**6)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").write_text("")
    with pytest.raises(ValueError, match="no maker.json"):
        TensorStore(tmp_path, MAKER, 10**6)


def test_the_store_stays_within_its_bound_and_keeps_what_it_has(tmp_path):
    fill(tmp_path, 0, 10, 2000)
    assert 1000 < size_of(tmp_path) <= 2000
    kept = set(tmp_path.glob("*/*.safetensors"))
    fill(tmp_path, 10, 10, 2000)
    assert set(tmp_path.glob("*/*.safetensors")) == kept


def test_several_processes_share_a_store_and_its_bound(tmp_path):
    bound = 40 * 500
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=fill, args=(tmp_path, start, 40, bound)) for start in (0, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert size_of(tmp_path) <= bound and int((tmp_path / "size").read_text()) == size_of(tmp_path)
    assert not list(tmp_path.rglob("*.part"))
    store, found = TensorStore(tmp_path, MAKER, bound), 0
    for number in range(60):
        tensor = store.get(digest(torch.tensor(number)))
        assert tensor is None or tensor.eq(number).all()
        found += tensor is not None
    assert found == len(list(tmp_path.glob("*/*.safetensors"))) > 20


def test_digest_tells_values_shapes_and_types_apart():
    tensors = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.ones(4)]
    assert len({digest(tensor) for tensor in tensors}) == 4
    assert digest(torch.arange(6).view(2, 3).T) == digest(torch.arange(6).view(2, 3).T.contiguous())


# Vision features


@pytest.fixture
def inputs(processor, make_image):
    samples = [Cards("train", 2)[0], {"image": make_image(3, 64, 128), "question": "what?", "answer": "star"}]
    return QuestionCollator(processor)(samples)


def test_features_are_encoded_once(model, processor, inputs, tiles_encoded, tmp_path):
    store = open_feature_cache(tmp_path, model, processor, 10**8)
    with torch.no_grad():
        expected = features_in(model(**inputs, selection="after_encoder"))
    with tiles_encoded(model) as counts:
        first, second = with_features(store, model, inputs), with_features(store, model, inputs)
        one = {name: value[1:] for name, value in inputs.items()}
        alone = with_features(store, model, one)["image_hidden_states"]
    assert sum(counts) == len(expected)
    assert "pixel_values" not in first and "pixel_attention_mask" not in first
    assert torch.allclose(first["image_hidden_states"], expected, atol=1e-5)
    assert torch.equal(first["image_hidden_states"], second["image_hidden_states"])
    assert torch.equal(alone, first["image_hidden_states"][-len(alone) :])


def test_only_what_is_new_is_encoded(model, processor, inputs, tiles_encoded, tmp_path):
    store = open_feature_cache(tmp_path, model, processor, 10**8)
    one = {name: value[1:] for name, value in inputs.items()}
    with tiles_encoded(model) as counts:
        tiles = len(with_features(store, model, one)["image_hidden_states"])
        every = len(with_features(store, model, inputs)["image_hidden_states"])
    assert sum(counts) == every and counts[-1] == every - tiles


def test_a_full_cache_only_costs_time(model, processor, inputs, tmp_path):
    store = open_feature_cache(tmp_path, model, processor, 0)
    features = with_features(store, model, inputs)["image_hidden_states"]
    assert not list(tmp_path.glob("*/*"))
    assert torch.equal(features, with_features(store, model, inputs)["image_hidden_states"])


def test_other_weights_and_other_processors_are_refused(make_model, processor, tmp_path):
    model = make_model()
    open_feature_cache(tmp_path, model, processor, 10**6)
    open_feature_cache(tmp_path, make_model(max_tiles=2), processor, 10**6)  # the budget is not the encoder's
    with torch.no_grad():
        next(model.model.connector.parameters()).add_(1)
    with pytest.raises(ValueError, match="it was made with encoder"):
        open_feature_cache(tmp_path, model, processor, 10**6)
    with pytest.raises(ValueError, match="was made with dtype"):
        open_feature_cache(tmp_path, make_model().to(torch.bfloat16), processor, 10**6)
    other = copy.deepcopy(processor)
    other.image_processor.image_mean = [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match="was made with image processor"):
        open_feature_cache(tmp_path, make_model(), other, 10**6)
