"""The door to VISOR: from a command line to a checkpoint with a policy, and the tables of its studies."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import training.run_visor as run_visor
import training.studies.depth as depth
from modeling_qgsa import QGSAConfig, QGSASmolVLMForConditionalGeneration
from training.methods.schedules import at_random, evenly, shortest


@pytest.fixture(scope="module")
def base(make_dense, processor, tmp_path_factory):
    dense = make_dense()
    config = dense.config
    config.text_config.num_hidden_layers = 4
    torch.manual_seed(0)
    dense = type(dense)._from_config(config).eval()
    folder = tmp_path_factory.mktemp("dense")
    dense.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


SMALL = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--ranking_size", "2", "--policy_size", "10"]
SMALL += ["--calibration_size", "0", "--shares", "0.3", "0.7", "1.0", "--turns", "2", "--use_cpu", "true"]


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("visor")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, run_visor, "--base_model", base, "--output_dir", folder / "visor", *SMALL)
        schedule = ("--schedules", "FCCT", "FCCT")  # one, drawn twice as often
        run(monkeypatch, run_visor, "--base_model", base, "--output_dir", folder / "vica", *SMALL, *schedule)
        cross = ("--vision_cross", "block", "--save_steps", "2", "--learning_rate", "0.01")
        run(monkeypatch, run_visor, "--base_model", base, "--output_dir", folder / "blocks", *SMALL, *cross)
    return folder


def test_a_checkpoint_with_a_policy(trained, base, single):
    model = QGSASmolVLMForConditionalGeneration.from_pretrained(trained / "visor").eval()
    dense = QGSASmolVLMForConditionalGeneration.from_dense(str(base))
    schedules = model.config.vision_schedules
    assert model.config.vision_policy and len(schedules) == 3 and schedules[-1] == "FFFF"
    assert not torch.equal(
        model.model.text_model.layers[0].mlp.up_proj.weight, dense.model.text_model.layers[0].mlp.up_proj.weight
    )
    assert torch.equal(
        model.model.connector.modality_projection.proj.weight, dense.model.connector.modality_projection.proj.weight
    )
    selection = model.select(**single)
    assert selection.visual_tokens[0] == 17 * 16 and 0 < selection.vision_share[0] <= 1
    assert json.loads((trained / "visor" / "visor.json").read_text())["policy"]["samples"] == 10


def test_one_schedule_is_fixed(trained, single):
    model = QGSASmolVLMForConditionalGeneration.from_pretrained(trained / "vica").eval()
    assert model.config.vision_layers == ["full", "cross", "cross", "text"] and not model.config.vision_policy
    expected = model.generate(**single, vision_budget="FCCT", max_new_tokens=3)
    assert torch.equal(model.generate(**single, max_new_tokens=3), expected)


def test_blocks_are_trained_and_saved(trained, base, single):
    model = QGSASmolVLMForConditionalGeneration.from_pretrained(trained / "blocks").eval()
    dense = QGSASmolVLMForConditionalGeneration.from_dense(str(base))
    config, visor = model.config, QGSAConfig.from_pretrained(trained / "visor")
    assert config.vision_cross == "block" and config.vision_policy and len(config.vision_schedules) == 3
    assert config.vision_ranking == visor.vision_ranking  # the layers are ranked without the blocks
    looks = {number for letters in config.vision_schedules for number, kind in enumerate(letters) if kind == "C"}
    opened = {number for number, block in enumerate(model.model.vision_blocks) if block.is_trained}
    assert opened and opened <= looks
    resumed = load_file(trained / "blocks" / "checkpoint-2" / "adapter_model.safetensors")
    for number, block in enumerate(model.model.vision_blocks):
        for name, weight in block.named_parameters():
            assert torch.equal(resumed[f"base_model.model.model.vision_blocks.{number}.{name}"], weight)
    adapted, given = (each.model.text_model.layers[0].mlp.up_proj.weight for each in (model, dense))
    assert not torch.equal(adapted, given)
    with torch.no_grad():
        looking, blind = (model(**single, vision_budget=letters).logits for letters in ("CCCC", "TTTT"))
    assert not torch.equal(looking, blind)


def test_the_table(trained, base, tmp_path, monkeypatch, capsys):
    options = ["--visor", trained / "visor", "--vica", trained / "vica", "--calibrated", trained / "visor"]
    options += ["--blocks", trained / "blocks"]
    options += ["--visor_calibrated", trained / "visor", "--ranking_size", 2, "--test_size", 3, "--flops_questions", 1]
    run(monkeypatch, depth, "--base_model", base, "--output_dir", tmp_path, *options)
    rows = {row["system"]: row for row in json.loads((tmp_path / "visor_cards.json").read_text())["rows"]}
    assert list(rows)[0] == "dense" and {"visor", "vica", "blank-image", "qgsa+visor"} <= set(rows)
    assert {"visor, quantile 0.8", "visor, quantile 0.6"} <= set(rows)
    for name in ("ranked", "evenly spaced", "shortv", "random layers", "visor", "visor-blocks"):
        assert sum(each.startswith(f"{name}, ") and each.endswith("%") for each in rows) == 2
    assert rows["untrained, 4 full"]["accuracy"] == rows["dense"]["accuracy"]
    assert rows["untrained, 4 full"]["visual_flops"] == rows["dense"]["visual_flops"]
    assert rows["vica"]["visual_flops"] < rows["dense"]["visual_flops"]
    for row in rows.values():  # methods that prune spend no more than the schedule they are compared with
        if row["system"].startswith(("fastv", "visionzip")):
            assert (
                row["visual_flops"]
                <= 1.02
                * sorted(
                    rows[name]["visual_flops"] for name in rows if name.startswith("visor, ") and name.endswith("%")
                )[1]
            )
    table, families = capsys.readouterr().out.strip().split("\n\n")[-2:]
    assert table.count("\n") == families.count("\n") == len(rows) + 1


def test_schedules_of_rivals():
    assert evenly(0, 4) == "CCCC" and evenly(2, 4) == "FCFC" and evenly(4, 4) == "FFFF"
    assert shortest(2, [0.1, 0.4, 0.0, 0.2]) == "CFCF"
    assert at_random(2, 4).count("F") == 2 and at_random(2, 4) == at_random(2, 4)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--base_model", ""], "base_model (''): required"),
        (["--schedules", "FF"], "schedules (2 layers) must have one kind for each of the 4 layers"),
        (["--vision_cross", "blocks"], "vision_cross ('blocks'): choose from own, block"),
        (["--turns", "0"], "turns (0) must be at least 1"),
        (["--lora_rank", "0"], "lora_rank (0) must be at least 1"),
        (["--dataset", "vqa_rad", "--data_dir", "nowhere", "--turns", "1"], "nowhere"),
        (["--dataset", "vqa_rad"], "turns (2) and families (''): for cards alone"),
    ],
)
def test_bad_input(arguments, complaint, base, tmp_path, monkeypatch):
    given = ["--base_model", base, "--output_dir", tmp_path / "out", *SMALL, *arguments]
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, run_visor, *given)
    assert complaint in str(error.value)
    assert not list((tmp_path / "out").glob("*.safetensors"))
