from types import SimpleNamespace

import pytest
import torch

from modeling_qgsa import tuning_qgsa
from modeling_qgsa.tuning_qgsa import AT_ONCE, HELD_UP, SECONDS, Tuning, fastest_encoder, race


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
