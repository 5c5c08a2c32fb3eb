import json
import os
import threading
from types import SimpleNamespace

import pytest
import torch

from modeling_qgsa import tuning_qgsa
from modeling_qgsa.tuning_qgsa import (
    AT_ONCE,
    HELD_UP,
    SECONDS,
    Tuning,
    fastest_encoder,
    measured_on,
    race,
    thread_counts,
    usable_cores,
)


BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def scripted(monkeypatch):
    """Makes `race` find the given seconds, by key; returns the keys of all races, in order."""

    def script(seconds):
        races = []

        def scripted_race(calls, clock):
            for call in calls.values():
                call()
            races.append(list(calls))
            return {name: seconds[name] for name in calls}

        monkeypatch.setattr(tuning_qgsa, "race", scripted_race)
        return races

    return script


@pytest.fixture(autouse=True)
def cores(monkeypatch):
    """Sets the numbers of threads that are compared: the present one unless told otherwise."""

    def compare(*numbers):
        monkeypatch.setattr(tuning_qgsa, "thread_counts", lambda: list(numbers))

    compare(1)
    return compare


# The race


def racing(*takes):
    """Run a race between calls that take the given seconds; returns the seconds found, and the numbers of calls."""
    clock, counts = SimpleNamespace(time=0.0), [0] * len(takes)

    def call(number):
        counts[number] += 1
        times = takes[number]
        clock.time += times[min(counts[number], len(times)) - 1]

    calls = {number: lambda number=number: call(number) for number in range(len(takes))}
    return race(calls, lambda: clock.time), counts


def test_a_race_finds_the_fewest_seconds_of_calls_that_take_turns():
    seconds, counts = racing([0.03, 0.02, 0.04], [0.05, 0.01])
    assert seconds == pytest.approx({0: 0.02, 1: 0.01})
    assert counts[0] == counts[1] > 10, "short calls are repeated"


def test_the_slow_drop_out_and_the_clock_ends_a_race():
    seconds, counts = racing([0.1], [0.5], [0.11])
    assert seconds == pytest.approx({0: 0.1, 1: 0.5, 2: 0.11})
    assert counts == [2, 1, 2], "the slow one is not called again"
    assert racing([SECONDS], [1.5 * SECONDS])[1] == [1, 1], "one round takes all the time"
    assert racing([0.3], [0.7])[1] == [1, 1], "only one is left"


def test_a_call_that_was_held_up_once_may_still_win():
    seconds, counts = racing([0.01], [0.9 * HELD_UP, 0.005])
    assert seconds[1] == pytest.approx(0.005) and counts[1] > 1


# The choice


def test_the_fastest_is_chosen_and_the_present_setting_within_noise():
    one = {None: 1.0}
    assert Tuning({FLOAT32: 1.0, BFLOAT16: 0.5}, one).vision_dtype == BFLOAT16
    assert Tuning({FLOAT32: 1.0, BFLOAT16: 4.4}, one).vision_dtype == FLOAT32
    assert Tuning({FLOAT32: 1.0, BFLOAT16: 0.96}, one).vision_dtype == FLOAT32
    assert Tuning({BFLOAT16: 1.04, FLOAT32: 1.0}, one).vision_dtype == BFLOAT16
    assert Tuning({FLOAT32: 9.0, BFLOAT16: 1.01, torch.float16: 1.0}, one).vision_dtype == BFLOAT16
    assert Tuning({}, {None: 1.0, 1: 0.85}).tiles_per_step == 1
    assert Tuning({}, {2: 1.0, 1: 0.98, 4: 0.97}).tiles_per_step == 2


def test_what_was_found_is_told_in_one_line():
    found = Tuning({FLOAT32: 0.0981, BFLOAT16: 0.039}, {None: 0.038, 1: 0.039})
    assert str(found) == (
        "bfloat16, all tiles at once (ms per tile and layer: float32 98.1, bfloat16 39; "
        "all tiles at once 38, 1 tile at a time 39)"
    )


@pytest.mark.parametrize(("present", "steps"), [(None, [None, 1]), (1, [1, 4]), (2, [2, 1, 4]), (9, [9, 1])])
def test_present_setting_and_others_are_compared(make_model, scripted, present, steps):
    races = scripted({FLOAT32: 1.0, BFLOAT16: 1.0, None: 1.0, 1: 1.0, 2: 1.0, AT_ONCE: 1.0, 9: 1.0})
    model = make_model(tiles_per_step=present)
    assert fastest_encoder(model.model).tiles_per_step == present
    assert races == [[FLOAT32, BFLOAT16], steps]


def test_tune_sets_the_fastest_and_says_so(make_model, single, scripted, capsys):
    model = make_model()
    weights = state(model)
    scripted({FLOAT32: 2.0, BFLOAT16: 1.0, None: 1.0, 1: 0.5})
    assert model.tune() is model
    assert (model.model.vision_model.dtype, model.model.connector.modality_projection.proj.weight.dtype) == (
        BFLOAT16,
        BFLOAT16,
    )
    assert model.config.tiles_per_step == 1 and model.dtype == FLOAT32
    assert capsys.readouterr().out.startswith("encoder tuned: bfloat16, 1 tile at a time (ms per tile and layer: ")
    for name, weight in model.state_dict().items():
        encodes = "vision_model" in name or "connector" in name
        assert torch.equal(weight, weights[name].to(BFLOAT16) if encodes else weights[name]), name
    explicit = make_model().tune(BFLOAT16, 1)
    assert torch.equal(logits(model, single), logits(explicit, single))


def test_tune_finds_the_way_back(make_model, scripted):
    """A checkpoint in bfloat16 on a machine that is slow in it."""
    model = make_model().to(BFLOAT16)
    races = scripted({FLOAT32: 1.0, BFLOAT16: 4.4, None: 1.0, 1: 1.0})
    model.tune()
    assert races[0] == [BFLOAT16, FLOAT32]
    assert (model.model.vision_model.dtype, model.dtype, model.config.tiles_per_step) == (FLOAT32, BFLOAT16, None)


def test_where_the_present_setting_wins_nothing_changes(make_model, single, scripted):
    model, random = make_model(), torch.get_rng_state()
    before, weights, config = logits(model, single), state(model), model.config.to_dict()
    scripted({FLOAT32: 1.0, BFLOAT16: 1.0, None: 1.0, 1: 1.0})
    model.tune()
    assert torch.equal(logits(model, single), before)
    assert torch.equal(torch.get_rng_state(), random) and model.config.to_dict() == config
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]) and weight.dtype == weights[name].dtype, name


def test_measuring_leaves_the_model_alone(make_model):
    """For real: every setting is timed, and weights, gradients and training mode stay as they are."""
    model, random = make_model(tiles_per_step=2).train(), torch.get_rng_state()
    weights = state(model)
    found = fastest_encoder(model.model)
    assert list(found.by_dtype) == [FLOAT32, BFLOAT16] and list(found.by_step) == [2, 1, AT_ONCE]
    assert all(0 < seconds < 1 for seconds in [*found.by_dtype.values(), *found.by_step.values()])
    assert torch.equal(torch.get_rng_state(), random) and model.model.vision_model.training
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


# Arguments


def test_with_arguments_nothing_is_measured(make_model, scripted, capsys):
    races = scripted({})
    model = make_model().tune(tiles_per_step=3)
    assert (model.model.vision_model.dtype, model.config.tiles_per_step) == (FLOAT32, 3)
    model.tune(BFLOAT16)
    assert (model.model.vision_model.dtype, model.config.tiles_per_step) == (BFLOAT16, 3)
    assert races == [] and capsys.readouterr().out == ""


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
def test_a_step_is_an_integer_of_at_least_one(make_model, value):
    model = make_model()
    with pytest.raises(ValueError, match=r"tiles_per_step \(.*\) must be an integer of at least 1"):
        model.tune(BFLOAT16, value)
    assert model.model.vision_model.dtype == FLOAT32, "nothing is changed"


@pytest.mark.parametrize("value", ["bfloat16", torch.int8, torch.complex64, 16])
def test_a_dtype_is_a_floating_point_one(make_model, value):
    with pytest.raises(ValueError, match=r"vision_dtype \(.*\) must be a floating-point dtype"):
        make_model().tune(value)


def test_an_encoder_that_cannot_be_measured_is_named(make_model):
    model = make_model()
    layer = model.model.vision_model.encoder.layers[1].mlp
    layer.fc1.weight = torch.nn.Parameter(layer.fc1.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.fc1.weight is quantized \(int8\): .* tune\(tiles_per_step=1\)"
    ):
        model.tune()
    layer.fc1.weight = torch.nn.Parameter(layer.fc1.weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers.1.mlp.fc1.weight is offloaded"):
        model.tune()
    assert model.tune(tiles_per_step=1).config.tiles_per_step == 1


# Threads


def test_the_fastest_number_of_threads_is_applied(make_model, scripted, cores, capsys):
    cores(1, 2)
    races = scripted({1: 1.0, 2: 0.6, FLOAT32: 0.6, BFLOAT16: 0.9, None: 0.6})
    model = make_model()
    found = fastest_encoder(model.model)
    assert (found.threads, torch.get_num_threads()) == (2, 1), "measuring puts the number back"
    assert races == [[1, 2], [FLOAT32, BFLOAT16], [None, 1]]
    model.tune()
    assert torch.get_num_threads() == 2
    assert "; 2 threads (1 thread 1e+03, 2 threads 600)" in capsys.readouterr().out
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [2], "as in the thread of a server"


def test_dtypes_and_steps_are_compared_on_the_chosen_number_of_threads(make_model, cores, monkeypatch):
    cores(1, 2)
    seen = []

    def watching(calls, clock):
        seen.append(torch.get_num_threads())
        return {name: 1 / (number + 1) for number, name in enumerate(calls)}

    monkeypatch.setattr(tuning_qgsa, "race", watching)
    assert fastest_encoder(make_model().model).by_threads == {1: 1.0, 2: 0.5}
    assert seen == [1, 2, 2]


def test_threads_are_put_back_after_an_error(make_model, cores, monkeypatch):
    cores(2, 3)

    def failing(calls, clock):
        calls[3]()
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning_qgsa, "race", failing)
    with pytest.raises(KeyboardInterrupt):
        fastest_encoder(make_model().model)
    assert torch.get_num_threads() == 1


def test_a_single_number_of_threads_is_not_compared(make_model, scripted):
    races = scripted({FLOAT32: 1.0, BFLOAT16: 0.5, None: 1.0, 1: 1.0})
    assert fastest_encoder(make_model().model).by_threads == {1: 1.0} and len(races) == 2


def test_threads_are_measured_for_real(make_model, cores):
    cores(1, 2)
    found = fastest_encoder(make_model().model)
    assert list(found.by_threads) == [1, 2] and all(0 < spent < 1 for spent in found.by_threads.values())


def test_threads_can_be_set_without_measuring(make_model, scripted):
    races = scripted({})
    model = make_model().tune(threads=2)
    assert torch.get_num_threads() == 2 and races == []
    assert (model.model.vision_model.dtype, model.config.tiles_per_step) == (FLOAT32, None)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
def test_threads_are_an_integer_of_at_least_one(make_model, value):
    with pytest.raises(ValueError, match=r"threads \(.*\) must be an integer of at least 1"):
        make_model().tune(threads=value)
    assert torch.get_num_threads() == 1


def test_cores_are_those_that_a_process_may_use(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning_qgsa, "allowed_cores", lambda: list(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    quota = tmp_path / "cpu.max"
    assert usable_cores(quota) == 8, "no container"
    for text, expected in (("max 100000\n", 8), ("250000 100000\n", 3), ("50000 100000\n", 1)):
        quota.write_text(text)
        assert usable_cores(quota) == expected
    quota.unlink()
    for named, expected in (("2", 2), ("16", 8), ("0", 8), ("4,2", 8), ("", 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", named)
        assert usable_cores(quota) == expected


def test_physical_and_logical_cores_are_compared(tmp_path, monkeypatch):
    """Eight logical cores, two to each physical one; the present number comes first."""
    monkeypatch.setattr(tuning_qgsa, "allowed_cores", lambda: list(range(8)))
    monkeypatch.setattr(tuning_qgsa, "usable_cores", lambda: 8)
    assert thread_counts(f"{tmp_path}/{{}}") == [1, 8], "elsewhere than on Linux"
    for core in range(8):
        (tmp_path / str(core)).write_text(f"{core % 4},{core % 4 + 4}\n")
    assert thread_counts(f"{tmp_path}/{{}}") == [1, 4, 8]
    torch.set_num_threads(4)
    assert thread_counts(f"{tmp_path}/{{}}") == [4, 8]
    monkeypatch.setattr(tuning_qgsa, "usable_cores", lambda: 2)
    assert thread_counts(f"{tmp_path}/{{}}") == [4, 2], "a container with a share of the cores"


def test_this_machine_has_cores():
    assert 1 <= usable_cores() <= os.cpu_count() and torch.get_num_threads() in thread_counts()


# Saved

FOUND = Tuning({FLOAT32: 0.2, BFLOAT16: 0.05}, {None: 0.05, 1: 0.04, 4: 0.06}, {1: 0.2, 2: 0.1})


def test_what_was_found_is_saved_and_loaded(make_model, tmp_path):
    path, model = tmp_path / "tuning.json", make_model().model
    FOUND.save(path, model)
    assert Tuning.load(path, model) == FOUND
    assert [item.name for item in tmp_path.iterdir()] == ["tuning.json"]
    saved = json.loads(path.read_text())
    assert saved["torch"] == torch.__version__ and saved["hidden_size"] == 32 and saved["processor"]
    assert list(Tuning.load(path, model).by_dtype) == [FLOAT32, BFLOAT16], "the present one stays first"


def test_tune_saves_and_the_next_one_loads(make_model, scripted, cores, tmp_path, capsys):
    cores(1, 2)
    races = scripted({1: 1.0, 2: 0.5, FLOAT32: 2.0, BFLOAT16: 1.0, None: 3.0})
    path = tmp_path / "tuning.json"
    first = make_model().tune(saved=path)
    assert len(races) == 3
    torch.set_num_threads(1)
    second = make_model().tune(saved=str(path))
    assert len(races) == 3, "nothing is measured again"
    assert torch.get_num_threads() == 2
    for model in (first, second):
        assert (model.model.vision_model.dtype, model.config.tiles_per_step) == (BFLOAT16, 1)
    one, other = capsys.readouterr().out.splitlines()
    assert one == other and one.startswith("encoder tuned: bfloat16, 1 tile at a time") and one.endswith(f" {path}")


def test_all_tiles_at_once_replace_a_step(make_model, tmp_path):
    """The step that was present where the file was made is not the one of this model."""
    path, model = tmp_path / "tuning.json", make_model(tiles_per_step=1)
    Tuning({FLOAT32: 0.2}, {None: 0.05, 1: 0.2}, {1: 0.2}).save(path, model.model)
    assert model.tune(saved=path).config.tiles_per_step is None


OTHERS = {
    "processor": "Some CPU",
    "cores": 999,
    "device": "NVIDIA H100",
    "torch": "1.0",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "patch_size": 14,
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_tuning_from_elsewhere_is_refused(make_model, tmp_path, name, scripted):
    path, model, races = tmp_path / "tuning.json", make_model(), scripted({})
    FOUND.save(path, model.model)
    there, here = OTHERS[name], measured_on(model.model)[name]
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: there}))
    kept = path.read_text()
    with pytest.raises(ValueError) as refused:
        model.tune(saved=path)
    complaint = f"{name} ({there!r}) must be {here!r}, as here; delete the file to measure again"
    assert str(refused.value) == f"{path} is not a tuning for this model and machine: {complaint}"
    assert path.read_text() == kept and races == [] and model.model.vision_model.dtype == FLOAT32


def change(name, pairs):
    """A change of one field of a saved file."""
    return lambda saved: saved["seconds_per_tile_and_layer"].update({name: pairs})


@pytest.mark.parametrize(
    "broken, complaint",
    [
        (change("vision_dtype", [["float99", 1.0]]), r"vision_dtype \('float99'\) must be a floating-point dtype"),
        (change("vision_dtype", [["int8", 1.0]]), r"vision_dtype \(torch.int8\) must be a floating-point dtype"),
        (change("vision_dtype", [["nn", 1.0]]), r"vision_dtype \(<module .*\) must be a floating-point dtype"),
        (change("vision_dtype", [[None, 1.0]]), r"vision_dtype \(null\) must be given"),
        (change("vision_dtype", []), r"vision_dtype \(\[\]\) must be a list of settings and their seconds"),
        (change("vision_dtype", [["float32", -1.0]]), r"its seconds \(-1.0\) must be a positive number"),
        (change("vision_dtype", [["float32", float("nan")]]), r"its seconds \(nan\) must be a positive number"),
        (change("tiles_per_step", [[0, 1.0]]), r"tiles_per_step \(0\) must be an integer of at least 1"),
        (change("tiles_per_step", [[1]]), r"tiles_per_step \(\[1\]\) must be a setting and its seconds"),
        (change("threads", [[0, 1.0]]), r"threads \(0\) must be an integer of at least 1"),
        (change("threads", [[{}, 1.0]]), r"threads \(\{\}\) must be an integer of at least 1"),
        (change("threads", None), r"threads \(None\) must be a list"),
        (lambda saved: saved.clear(), r"processor \(None\) must be '.+', as here"),
        (lambda saved: saved.update(seconds_per_tile_and_layer=[]), r"seconds_per_tile_and_layer \(\[\]\) must be"),
    ],
)
def test_a_broken_tuning_is_refused_in_one_line(make_model, tmp_path, broken, complaint):
    path, model = tmp_path / "tuning.json", make_model().model
    FOUND.save(path, model)
    saved = json.loads(path.read_text())
    broken(saved)
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=complaint) as refused:
        Tuning.load(path, model)
    assert "\n" not in str(refused.value) and str(refused.value).startswith(f"{path} is not a tuning")


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"\xff\xfe", b"[" * 100_000])
def test_what_is_not_a_tuning_is_refused_and_left_alone(make_model, tmp_path, content):
    path = tmp_path / "tuning.json"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"tuning.json is not a tuning for this model and machine: .+; delete"
    ) as refused:
        make_model().tune(saved=path)
    assert "\n" not in str(refused.value) and path.read_bytes() == content


def test_a_truncated_tuning_is_refused(make_model, tmp_path):
    path, model = tmp_path / "tuning.json", make_model().model
    FOUND.save(path, model)
    whole = path.read_text()
    for length in range(0, len(whole) - 2, 50):
        path.write_text(whole[:length])
        with pytest.raises(ValueError, match="is not a tuning for this model and machine: .* line .* column"):
            Tuning.load(path, model)


def test_a_file_is_whole_or_absent(make_model, tmp_path, monkeypatch):
    """A disk that is full, and a process that is stopped, while the file is written."""
    path, model = tmp_path / "tuning.json", make_model().model

    def half(self, text):
        with self.open("w") as file:
            file.write(text[:30])
        raise OSError("No space left on device")

    monkeypatch.setattr(type(path), "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        FOUND.save(path, model)
    assert list(tmp_path.iterdir()) == []


def test_saved_goes_alone_and_into_a_folder(make_model, tmp_path, scripted):
    races, model = scripted({}), make_model()
    with pytest.raises(ValueError, match=r"saved \(a.json\) holds all settings: give it without the others"):
        model.tune(BFLOAT16, saved="a.json")
    with pytest.raises(ValueError, match=r"saved \(.*tuning.json\): .*nowhere is not a folder; make it first"):
        model.tune(saved=tmp_path / "nowhere" / "tuning.json")
    assert races == []
