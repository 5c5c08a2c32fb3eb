"""Growth of seconds and memory, measured on the tiny model; exponents, tables and plot also on rows made up."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from training.costs.systems import SYSTEMS as ALL
from training.studies import growth
from training.studies.growth import (
    AXES,
    NAME,
    Growth,
    GrowthArguments,
    exponent,
    fit,
    format_exponents,
    format_growth,
    growth_tables,
    plot_growth,
    points_of,
)


ROOT = Path(__file__).parents[3]
SYSTEMS = ["dense", "qgsa", "qgsa-blocks"]


@pytest.fixture(scope="module")
def given(tmp_path_factory, make_image):
    """Options of a run on the tiny model."""
    folder = tmp_path_factory.mktemp("growth")
    (folder / "images").mkdir()
    for seed in range(2):
        make_image(seed).save(folder / "images" / f"{seed}.png")
    (folder / "smolvlm-tiny-instruct").symlink_to(ROOT / "hub_cards" / "tiny-dense")
    return {
        "architecture": "tiny",
        "checkpoints": str(folder),
        "images": str(folder / "images"),
        "sizes": [64, 256, 384, 512],
        "tiles": [1, 16],
        "questions": 2,
        "batch_sizes": [1, 2],
        "new_tokens": [1, 2],
        "image_size": 256,
        "longest_edge": 384,
        "dense_seconds": 1e9,
        "output_dir": str(folder / "output"),
    }


@pytest.fixture(scope="module")
def results(given):
    """Content of the results file of a run, made by the script's `main`."""
    options = []
    for name, value in given.items():
        options += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["growth.py", *options])
        patch.setattr(growth, "keep_freed_memory", lambda: None)  # for the whole process
        growth.main()
    return json.loads(Path(given["output_dir"], f"{NAME}.json").read_text())


def select(rows, axis, system):
    return [row for row in rows if (row["axis"], row["system"]) == (axis, system)]


def test_every_point_has_a_row_of_every_system(results):
    rows = results["rows"]
    values = {"size": [64, 256, 384, 512], "tiles": [1, 16], "questions": [1, 2], "batch_size": [1, 2]}
    for axis in AXES:
        for system in SYSTEMS:
            found = select(rows, axis, system)
            assert [row["value"] for row in found] == values.get(axis, [1, 2])
            for row in found:
                assert ("skipped" in row) == ((axis, system, row["value"]) == ("tiles", "dense", 1))
    assert results["environment"]["processor"] and str(ROOT) not in json.dumps(results)
    for row in rows:
        if "skipped" not in row:
            assert 0 < row["seconds"]["processing"] < row["seconds_median"] and row["weight_bytes"] > 1e6
            low, high = row["seconds_range"]
            assert low <= row["seconds_median"] <= high and row["memory_bytes"] >= 0


def test_one_thing_is_varied_at_a_time(results):
    rows = results["rows"]
    assert [row["tiles_mean"] for row in select(rows, "size", "dense")] == [0, 16, 36, 36]
    assert [row["tiles_mean"] for row in select(rows, "size", "qgsa")] == [0, 2, 2, 2]
    assert [row["longest_edge"] for row in select(rows, "size", "qgsa")] == [64, 256, 384, 384]
    assert [row["tiles_mean"] for row in select(rows, "tiles", "qgsa")] == [1, 16]
    assert select(rows, "tiles", "dense")[0]["skipped"] == "encodes all 16 tiles"
    for row in rows:
        if row["axis"] not in ("size", "questions") and "skipped" not in row:
            assert row["image_px"] == 256 and row["visual_tokens_mean"] == (272 if row["system"] == "dense" else 17)
    base, answered = select(rows, "batch_size", "qgsa")[0], select(rows, "new_tokens", "qgsa")
    assert base["seconds_median"] == select(rows, "size", "qgsa")[1]["seconds_median"], "measured once"
    assert [row["flops"]["decode"] for row in answered] == sorted(row["flops"]["decode"] for row in answered)


def test_questions_about_one_image_add_up(results):
    for system in SYSTEMS:
        one, two = select(results["rows"], "questions", system)
        assert one["seconds_median"] < two["seconds_median"] and one["memory_bytes"] <= two["memory_bytes"]


def test_dense_is_left_out_where_it_takes_too_long(given):
    run = GrowthArguments(**{**given, "dense_seconds": 0.0, "sizes": [64, 128], "systems": ["dense", "qgsa"]})
    dense, qgsa = (SimpleNamespace(name=name, precision="float32", system=ALL[name]) for name in run.systems)
    study = Growth.__new__(Growth)
    study.run, study.rows, study.tile = run, [], 64
    first, second = (study.head(dense, point) for point in points_of(run)[:2])
    assert study.why_not(dense, first) is None, "nothing is known of its seconds yet"
    study.rows = [first | {"seconds_median": 2.0}]
    assert study.why_not(dense, second) == "would take about 10 s", "five tiles in place of one"
    assert study.why_not(qgsa, study.head(qgsa, points_of(run)[1])) is None
    study.run.dense_seconds = 10.0
    assert study.why_not(dense, second) is None


def test_questions_that_were_not_asked_are_not_looked_up(given):
    """Dense may turn out faster than it was judged to be when the number of its questions was chosen."""
    run = GrowthArguments(**{**given, "dense_seconds": 70.0, "systems": ["dense"]})
    (dense,) = (SimpleNamespace(name=name, precision="float32", system=ALL[name]) for name in run.systems)
    study = Growth.__new__(Growth)
    study.run, study.images, study.tile = run, [], 64
    one, two = (point for point in points_of(run) if point.axis == "questions")
    study.asked = {"dense": [{"seconds_median": 30.0}]}
    study.rows = [study.head(dense, one) | study.asked["dense"][0]]
    assert study.body(dense, one, study.head(dense, one)) == {"seconds_median": 30.0}
    assert study.body(dense, two, study.head(dense, two)) == {"skipped": "would take about 60 s"}


def test_all_models_in_the_fastest_precision_are_tuned(given, monkeypatch):
    tuned = []
    monkeypatch.setattr(growth, "tune_alike", tuned.extend)
    run = GrowthArguments(**{**given, "systems": ["dense", "qgsa", "qgsa-half-glance"]})
    _, fast, half = growth.make_runners(run)
    assert tuned == [fast.model, half.model]


def test_a_long_call_is_not_repeated(given, monkeypatch):
    run = GrowthArguments(**{**given, "repeats": 3, "systems": ["qgsa"]})
    study = Growth(run, growth.make_runners(run), growth.pick_images(run.images, 2))
    (runner,), point, calls = study.runners, points_of(run)[0], []
    timed = runner.time
    monkeypatch.setattr(runner, "time", lambda *given: calls.append(1) or timed(*given))
    study.body(runner, point, study.head(runner, point))
    assert len(calls) == 1 + 3, "the first one gives the memory"
    monkeypatch.setattr(growth, "LONG", 0.0)
    study.body(runner, point, study.head(runner, point))
    assert len(calls) == 4 + 1


# Exponents, tables and plot


def test_an_exponent_is_the_slope_between_logarithms():
    assert exponent([(x, 3 * x**2) for x in (1, 2, 8)]) == pytest.approx(2)
    assert exponent([(1, 4.0), (2, 4.0), (4, 4.0)]) == pytest.approx(0)
    assert exponent([(1, 1.0), (2, 4.0), (4, 4.0)]) == pytest.approx(1)
    assert (
        exponent([])
        is exponent([(2, 1.0)])
        is exponent([(2, 1.0), (2, 3.0)])
        is exponent([(1, 0.0), (2, 1.0)])
        is None
    )


def make_row(axis, value, system, question=None, resizing=None, memory=None, tiles=16, edge=None):
    row = {"axis": axis, "value": value, "system": system, "image_tiles": tiles, "longest_edge": edge or value}
    if question is None:
        return row | {"skipped": "would take about 90 s"}
    seconds = {"seconds": {"processing": resizing}, "seconds_median": question + resizing}
    return row | seconds | {"memory_bytes": memory}


def made_rows():
    """Dense grows with the square of the size, ours does not; resizing does for both. One axis has one point."""
    rows = []
    for px, edge in ((512, 512), (1024, 1024), (2048, 2048), (4096, 2048)):
        tiles = (edge // 512) ** 2 if edge > 512 else 0
        rows.append(make_row("size", px, "dense", 5 * edge**2 / 1e6, px**2 / 1e8, 1e9, tiles, edge))
        rows.append(make_row("size", px, "qgsa", 2.5 if tiles else 0.8, px**2 / 1e8, 1e9, tiles, edge))
    for axis in list(AXES)[1:]:
        rows += [make_row(axis, 1, name, 2.0, 0.1, 2e9) for name in ("dense", "qgsa")]
        rows += [make_row(axis, 4, "dense"), make_row(axis, 4, "qgsa", 8.0, 0.4, 2e9)]
    return rows


def test_exponents_tell_their_range():
    rows = made_rows()
    slope, *limits = fit(rows, "size", "dense", "question, s")
    assert slope == pytest.approx(2) and limits == [1024, 2048], "where the tiles grow"
    slope, *limits = fit(rows, "size", "qgsa", "question, s")
    assert slope == pytest.approx(0) and limits == [1024, 2048]
    slope, *limits = fit(rows, "size", "qgsa", "resizing, s")
    assert slope == pytest.approx(2) and limits == [512, 4096]
    assert fit(rows, "batch_size", "dense", "question, s") is None, "a single point"
    lines = format_exponents(rows).splitlines()
    assert len(lines) == 2 + 2 * len(AXES) and len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| image size, px | dense | 2.00 [512, 4096] | 2.00 [1024, 2048] | 0.00 [1024, 2048] |"
    assert "| questions at once | dense | – | – | – |" in lines
    assert "| questions at once | qgsa | 1.00 [1, 4] | 1.00 [1, 4] | 0.00 [1, 4] |" in lines


def test_tables_say_what_was_not_measured():
    rows = made_rows()
    table = format_growth(rows, "batch_size").splitlines()
    assert table[0].startswith("| questions at once | resizing, s: dense | resizing, s: qgsa | question, s: dense |")
    assert table[2] == "| 1 | 0.10 | 0.10 | 2.00 | 2.00 | 2.00 | 2.00 |"
    assert table[3] == "| 4 | not measured | 0.40 | not measured | 8.00 | not measured | 2.00 |"
    assert [len({line.count("|") for line in text.splitlines()}) for text in growth_tables(rows)] == [1] * 6


def test_the_plot_has_a_panel_for_every_axis(tmp_path, results):
    for name, rows in (("made", made_rows()), ("measured", results["rows"])):
        plot_growth(rows, tmp_path / f"{name}.png")
        width, height = Image.open(tmp_path / f"{name}.png").size
        assert width > 2 * height > 1000


def test_the_script_writes_results_and_plot(results, given):
    assert results["preset"] == NAME and len(results["rows"]) == 3 * (4 + 2 + 2 + 2 + 2)
    assert sorted(path.name for path in Path(given["output_dir"]).iterdir()) == [f"{NAME}.json", f"{NAME}.png"]


@pytest.mark.parametrize(
    "fields, complaint",
    [
        ({"systems": ["dens"]}, r"systems \(dens\): unknown; choose from dense"),
        ({"repeats": 0}, r"repeats \(0\): must be at least 1"),
        ({"questions": 0}, r"questions \(0\): must be at least 1"),
        ({"batch_sizes": [0, 2]}, r"batch_sizes \(\[0, 2\]\): must be numbers of at least 1"),
        ({"sizes": []}, r"sizes \(\[\]\): must be numbers of at least 1"),
    ],
)
def test_bad_input(given, fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        GrowthArguments(**{**given, **fields})


def test_an_unknown_architecture_is_refused_before_anything_is_timed(given):
    with pytest.raises(ValueError, match=r"architecture \(8b\): .*smolvlm-8b-instruct is not a folder"):
        growth.make_runners(GrowthArguments(**given | {"architecture": "8b"}))
