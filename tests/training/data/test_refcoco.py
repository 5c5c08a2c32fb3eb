"""RefCOCO: the loader on small files with the published schema, boxes as text, and the grading."""

import io
import logging
import pickle

import datasets
import pytest
from PIL import Image

from training.data.cards import FEATURES as CARD_FEATURES
from training.data.refcoco import COLUMNS, HUB_ID, REFCOCO, box_answer, load_refcoco, parse_box, pixel_box


FEATURES = datasets.Features(
    {
        "question_id": datasets.Value("string"),
        "image": datasets.Image(),
        "question": datasets.Value("string"),
        "answer": datasets.List(datasets.Value("string")),
        "bbox": datasets.List(datasets.Value("float32")),
        "file_name": datasets.Value("string"),
    }
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _picture(colour="red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 32), colour).save(file, "PNG")
    return file.getvalue()


def _cut_jpeg() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 60).save(file, "JPEG")
    return file.getvalue()[: len(file.getvalue()) // 2]  # keeps the header: only a full read shows it


def _row(question_id, image=None, **change):
    row = {
        "question_id": question_id,
        "image": {"bytes": image or _picture(), "path": None},
        "question": "Describe the area circled in the image.",
        "answer": ["", " the red one ", "red"],
        "bbox": [16.0, 8.0, 32.0, 16.0],
        "file_name": f"{question_id}.jpg",
    }
    return row | change


GOOD = [_row("a"), _row("b", _picture("blue"), answer=["left"], bbox=[0.0, 0.0, 64.0, 32.0])]
BROKEN = [
    (_row("c", _cut_jpeg()), "broken image"),
    (_row("d") | {"image": None}, "missing image"),
    (_row("e", answer=[]), "no expression"),
    (_row("f", answer=None), "no expression"),
    (_row("g", answer=[" ", None]), "no expression"),
    (_row(" "), "no question id"),
    (_row("h", bbox=[40.0, 8.0, 32.0, 16.0]), "box outside the image"),
    (_row("i", bbox=[16.0, 8.0, 0.0, 16.0]), "box outside the image"),
    (_row("j", bbox=[16.0, 8.0, 32.0]), "box outside the image"),
    (_row("k", bbox=None), "box outside the image"),
]


def _folder(tmp_path, rows, name="val-00000-of-00001.parquet"):
    folder = tmp_path / "refcoco"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(path)
    return folder


def test_samples(tmp_path):
    samples = load_refcoco(_folder(tmp_path, GOOD), "val")
    assert len(samples) == 2 and samples.skipped == {}
    first = samples[0]
    assert set(first) == set(CARD_FEATURES)
    image = first.pop("image")
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (64, 32), (255, 0, 0))
    assert first == {
        "question_id": "a",
        "question": 'Where is "the red one"? '
        "Give its bounding box as [x0, y0, x1, y1], each from 0 to 100 per cent of the image.",
        "answer": "[25, 25, 75, 75]",
        "choices": [],
        "family": "refer",
        "tiles_needed": "unknown",
        "boxes": [[16, 8, 48, 24]],
    }
    assert (samples[1]["answer"], samples[1]["boxes"]) == ("[0, 0, 100, 100]", [[0, 0, 64, 32]])
    assert samples[1]["image"].getpixel((0, 0)) == (0, 0, 255)


def test_unusable_rows_are_counted_and_reported_once(tmp_path, caplog):
    folder = _folder(tmp_path, GOOD + [row for row, _ in BROKEN])
    with caplog.at_level(logging.WARNING, logger="training.data.rows"):
        samples = load_refcoco(folder)
    assert [sample["question_id"] for sample in samples] == ["a", "b"]
    reasons = [reason for _, reason in BROKEN]
    assert samples.skipped == {reason: reasons.count(reason) for reason in reasons}
    assert len(caplog.records) == 1
    assert "RefCOCO val: skipped 10 of 12 rows (box outside the image: 4, broken image: 1" in caplog.text


def test_each_split_finds_its_own_files(tmp_path):
    for number, split in enumerate(("train", "val", "test", "testA", "testB")):
        folder = _folder(tmp_path, [_row(str(number))], f"data/{split}-00000-of-00001.parquet")
    for number, split in enumerate(("train", "val", "test", "testA", "testB")):
        assert [row["question_id"] for row in load_refcoco(folder, split).rows] == [str(number)]


def test_the_hub_is_asked_without_a_folder(monkeypatch):
    def load_dataset(name, split):
        assert (name, split) == (HUB_ID, "testA")
        return datasets.Dataset.from_list(GOOD, features=FEATURES)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    samples = load_refcoco(split="testA")
    assert [sample["question_id"] for sample in samples] == ["a", "b"]
    assert pickle.loads(pickle.dumps(samples))[1]["image"].size == (64, 32)


def test_there_is_no_train_split_on_the_hub(tmp_path):
    with pytest.raises(ValueError, match=r"split \('train'\): lmms-lab/RefCOCO does not have it; choose from val"):
        load_refcoco(split="train")
    with pytest.raises(FileNotFoundError, match=r"no train\*.parquet in .*refcoco"):
        load_refcoco(_folder(tmp_path, GOOD), "train")
    with pytest.raises(ValueError, match=r"split \('testC'\): choose from train"):
        load_refcoco(split="testC")


@pytest.mark.parametrize("column", COLUMNS)
def test_a_missing_column_is_named(monkeypatch, column):
    table = datasets.Dataset.from_list(GOOD, features=FEATURES).remove_columns(column)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
    with pytest.raises(ValueError, match=f"missing column {column}; the table has .*file_name"):
        load_refcoco()


# Boxes


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ([10, 5, 20, 10], [10, 5, 30, 15]),
        ([0, 0, 64.5, 32.9], [0, 0, 64, 32]),  # over the edge by less than 1 px: clipped
        ([-0.5, -1, 20, 10], [0, 0, 19.5, 9]),
        ([-2, 0, 20, 10], []),
        ([0, 0, 66, 32], []),
        ([0, 30, 10, 4], []),
        ([64, 0, 0.5, 10], []),  # no area left
        ([70, 40, 5, 5], []),
        ([10, 5, 0, 10], []),
        ([10, 5, 20, -1], []),
        ([10, 5, float("nan"), 10], []),
        ([10, 5, None, 10], []),
        ([10, 5, 20], []),
        ([], []),
        (None, []),
    ],
)
def test_boxes_in_px(bbox, expected):
    assert pixel_box(bbox, (64, 32)) == expected


@pytest.mark.parametrize(
    ("box", "size", "answer"),
    [
        ([24, 90, 90, 264], (200, 300), "[12, 30, 45, 88]"),
        ([0, 0, 200, 300], (200, 300), "[0, 0, 100, 100]"),
        ([100.0, 100.0, 105.0, 109.0], (1000, 1000), "[10, 10, 11, 11]"),  # 10 to 10.5 per cent: rounded 10 to 10
        ([997.0, 0.0, 1000.0, 2.0], (1000, 1000), "[99, 0, 100, 1]"),
    ],
)
def test_box_answers_can_be_parsed(box, size, answer):
    assert box_answer(box, size) == answer
    assert str([int(number) for number in parse_box(answer)]) == answer


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[12, 30, 45, 88]", [12, 30, 45, 88]),
        ("It is at (12,30),(45,88).", [12, 30, 45, 88]),
        ("12 30 45 88", [12, 30, 45, 88]),
        ("[45, 30, 12, 88]", []),
        ("[12, 30, 45, 30]", []),
        ("[12, 30, 45]", []),
        ("[12, 30, 45, 88, 3]", []),
        ("[1.2, 3.4]", []),
        ("[12.5, 30, 45, 88]", []),
        ("[-12, 30, 45, 88]", []),
        ("[0, 0, 5, " + "9" * 400 + "]", []),
        ("on the left", []),
        ("", []),
    ],
)
def test_boxes_parsed_from_text(text, box):
    assert parse_box(text) == box


# Grading


def test_percentages_are_compared_with_fractions():
    samples = [{"answer": "[10, 20, 50, 60]", "boxes": [[0.1, 0.2, 0.5, 0.6]]}] * 3
    predictions = ["[10, 20, 50, 60]", "[10, 20, 50, 30]", "on the left"]
    assert REFCOCO.grade_all(predictions, samples).tolist() == [1, 0, 0]
    kept = [[[0.0, 0.0, 1.0, 1.0]], [[0.1, 0.2, 0.3, 0.6]], []]
    metric = REFCOCO.metric(predictions, samples, kept)
    assert metric["accuracy_at_50"] == pytest.approx(1 / 3)
    assert metric["mean_iou"] == pytest.approx((1 + 0.25) / 3)
    assert metric["kept_recall"] == pytest.approx((1 + 0.5) / 3)
