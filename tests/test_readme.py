"""The pages: tables match the committed results, named files exist, snippets run and commands parse."""

import json
import re
import shlex
import subprocess
import tomllib
from importlib.util import find_spec
from pathlib import Path

import export
import push_to_hub
import pytest
import serve
import serve_faults
import serve_load
import serve_ray_load
import serve_throughput
from serving import serving

from training.benchmark import BenchmarkArguments
from training.cli.arguments import Parser
from training.cli.groups import AnswerArguments
from training.cli.presets import parse_arguments
from training.costs.formula import paper_table
from training.costs.speed_report import format_headline, format_speed
from training.data.arguments import DataArguments
from training.data.cards import Cards
from training.evaluation.engines_report import (
    format_engines,
    format_first_table,
    format_own_budgets,
    read_accuracy,
    rows_of,
)
from training.evaluation.guided_report import format_exits, format_guided, format_guided_families
from training.evaluation.report import format_by_canvas, format_by_family, format_families, format_table
from training.learning.training_arguments import GROUPS, QGSATrainingArguments
from training.run_answers import AnswersArguments
from training.run_guided import PairArguments
from training.run_qgsa import TaskArguments, asks_for_answers
from training.run_stand_in import parse as parse_stand_in
from training.run_visor import parse as parse_visor
from training.studies.ablation import format_ablation
from training.studies.adaptive import AdaptiveArguments, best_fixed, format_adaptive, format_spending
from training.studies.canvases import CanvasesArguments, format_canvas_families, format_canvases
from training.studies.depth import DepthArguments, format_depth
from training.studies.depth_speed import DepthSpeedArguments, format_depth_speed, format_questions
from training.studies.engines import EnginesArguments
from training.studies.growth import GrowthArguments, growth_tables
from training.studies.guided_speed import GuidedSpeedArguments
from training.studies.guided_speed import format_speed as format_pair_speed
from training.studies.pareto import ParetoArguments, format_pareto
from training.studies.pointing import PointingArguments, format_pointing


ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
HEADING = re.compile(r"^#+ (.+)$", re.M)
HUB = ROOT / "hub_cards"
RESULTS = HUB / "results"


def adaptive_tables(rows):
    return [format_adaptive(rows), format_spending(rows[1], best_fixed(rows[2:], rows[1]))]


def engines_tables(rows):
    """Of each architecture: all systems, then those with whole tiles by m."""
    accuracy, sizes = read_accuracy(RESULTS), dict.fromkeys(row["architecture"] for row in rows)
    return [table(rows, size, accuracy) for size in sizes for table in (format_engines, format_own_budgets)]


def lines_of_sizes(rows):
    """One line per image size, with the seconds of five systems."""
    columns = ("dense-native-size", "qgsa-native-size", "dense-fast", "qgsa", "qgsa-blocks")
    by = {(row["longest_edge"], row["system"]): row["seconds_median"] for row in rows}
    return [f"| {edge} | " + " | ".join(f"{by[edge, c]:.2f}" for c in columns) + " |" for edge in {e for e, _ in by}]


TABLES = {
    "cards": lambda rows: [format_table(rows), format_families(rows)],
    "blocks_cards": lambda rows: [format_table(rows), format_families(rows)],
    "half_glance_cards": lambda rows: [format_table(rows), format_families(rows)],
    "half_glance_blocks_cards": lambda rows: [format_table(rows), format_families(rows)],
    "half_glance_calibrated_cards": lambda rows: [format_table(rows), format_families(rows)],
    "compact_cards": lambda rows: [format_table(rows), format_families(rows)],
    "ablation_cards": lambda rows: [format_ablation(rows)],
    "adaptive_cards": adaptive_tables,
    "canvases_cards": lambda rows: [format_canvases(rows), format_canvas_families(rows)],
    "vqa_rad": lambda rows: [format_table(rows)],
    "vqa_rad_published": lambda rows: [format_table(rows)],
    "pareto_cards": lambda rows: [format_pareto(rows)],
    "pointing_cards": lambda rows: [format_pointing(rows)],
    "pointing_small_cards": lambda rows: [format_pointing(rows)],
    "sgl_cards": lambda rows: [format_guided(rows), format_guided_families(rows), format_exits(rows)],
    "speed_attention_256m_cpu": lambda rows: [format_speed(rows, 2048)],
    "speed_attention_500m_cpu": lambda rows: [format_speed(rows, 2048)],
    "small_dense_cards": lambda rows: [format_by_canvas(rows)],
    "speed_sgl_500m_cpu": lambda rows: [format_pair_speed(rows)],
    "speed_sgl_2b_cpu": lambda rows: [format_pair_speed(rows)],
    "visor_cards": lambda rows: [format_depth(rows), format_by_family(rows)],
    "visor_small_cards": lambda rows: [format_depth(rows), format_by_family(rows)],
    "speed_visor_256m_float32_cpu": lambda rows: [format_depth_speed(rows), format_questions(rows)],
    "speed_visor_500m_float32_cpu": lambda rows: [format_depth_speed(rows), format_questions(rows)],
    "speed_visor_256m_bfloat16_cpu": lambda rows: [format_depth_speed(rows), format_questions(rows)],
    "speed_visor_500m_bfloat16_cpu": lambda rows: [format_depth_speed(rows)],
    "speed_engines_cpu": lambda rows: engines_tables(rows)[::2],
    "speed_engines_vnni_cpu": engines_tables,
    "speed_growth_cpu": growth_tables,
    "serve_cpu": lambda rows: [serve_load.format_load(rows)],
    "throughput_cpu": lambda rows: [serve_throughput.format_throughput(rows)],
    "serve_faults_cpu": lambda rows: [serve_faults.format_faults(rows)],
    "serve_faults_two_cores_cpu": lambda rows: [serve_faults.format_faults(rows)],
    "serve_ray_cpu": lambda rows: [serve_ray_load.format_ray_load(rows)],
    "speed_256m_cpu": lambda rows: [format_speed(rows, 2048)],
    "speed_256m_cpu_batch8": lambda rows: [format_speed(rows, 2048)],
    "speed_500m_cpu": lambda rows: [format_speed(rows, 2048)],
    "speed_sizes_cpu": lines_of_sizes,
}


@pytest.mark.parametrize("name", TABLES)
def test_the_results_page_holds_the_tables_of_the_results(name):
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    page = (RESULTS / "README.md").read_text()
    for table in TABLES[name](rows):
        assert table in page


def read_rows(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def test_the_readme_holds_the_first_table_and_its_reservations():
    engines, readme = rows_of(read_rows("speed_engines_vnni_cpu"), "256m"), README.read_text()
    assert format_first_table(engines, read_accuracy(RESULTS)) in readme
    torch = {row["system"]: row["seconds_median"] for row in engines if row["engine"].startswith("torch")}
    words, fast = " ".join(readme.split()), torch["dense-fast"]
    said = ", ".join(f"{torch[name]:.1f}" for name in ("dense-fast", "dense-global-only-fast", "qgsa"))
    assert f"half of the glance take {said} and {torch['qgsa-blocks-half-glance']:.1f} s" in words
    assert f"{fast / torch['qgsa']:.1f} and {fast / torch['qgsa-blocks-half-glance']:.1f} times faster" in words
    for reservation in (
        "two CPU cores",
        "random weights",
        "Not measured on a GPU",
        "accuracy on the published checkpoints has not been measured",
    ):
        assert reservation in words


def test_the_readme_holds_what_the_servers_gain():
    rows = {row["system"]: row for row in read_rows("throughput_cpu")}
    stock = rows["vllm"]["requests_per_second"]
    plugin, ours = (f"{rows[name]['requests_per_second'] / stock:.1f}" for name in ("vllm-qgsa", "qgsa-batches"))
    words = " ".join(README.read_text().split())
    assert (
        f"answers {plugin} times as many requests per second as with the plain checkpoint, and `serve.py` {ours}"
        in words
    )
    assert f"leaves {rows['vllm']['lost']} of the {rows['vllm']['requests']} without an answer" in words


def test_the_readme_holds_the_controls_of_the_demo():
    rows = {row["system"]: row for row in read_rows("cards")}
    delta = {name: f"{row['delta_vs_dense_pp']:.1f}" for name, row in rows.items()}
    qgsa, (low, high) = rows["qgsa"], rows["qgsa"]["delta_ci95"]
    words = " ".join(README.read_text().split())
    tokens, tiles = f"{qgsa['visual_tokens_mean']:.1f} of 272 visual tokens", f"{qgsa['tiles_mean']:.2f} of 16 tiles"
    assert f"at {delta['qgsa']} pp [{low:+.1f}, {high:+.1f}] with {tokens} and {tiles}" in words
    controls = f"random tokens at the same budget lose {delta['random'][1:]} pp"
    assert f"{controls}, and a grey image loses {delta['blank-image'][1:]} pp" in words


def test_the_readme_holds_what_half_of_the_glance_costs():
    loss = {row["system"]: f"{-row['delta_vs_dense_pp']:.1f}" for row in read_rows("half_glance_blocks_cards")}
    seconds = {
        row["system"]: f"{row['seconds_median']:.2f}"
        for row in rows_of(read_rows("speed_engines_vnni_cpu"), "256m")
        if row["precision"] == "int8" and row["engine"].startswith("onnxruntime")
    }
    ours, thumbnail, dense = (seconds[name] for name in ("qgsa-blocks-half-glance", "dense-global-only", "dense"))
    words = " ".join(README.read_text().split())
    assert (
        f"takes {ours} s in ONNX Runtime with int8 weights, the thumbnail alone {thumbnail}, every tile {dense}"
        in words
    )
    assert f"loses {loss['qgsa']} pp in float32, random tokens in its place {loss['random']} (" in words


def test_the_readme_holds_what_depth_adds():
    rows = {row["system"]: row for row in read_rows("visor_small_cards")}
    words = " ".join(README.read_text().split())

    def cell(name):
        return f"{rows[name]['flops']['total'] / 1e9:.2f}", f"{rows[name]['delta_vs_dense_pp']:.1f}"

    (both, loss), (alone, more), (dense, _) = map(cell, ("qgsa+visor", "qgsa-calibrated", "dense"))
    said = f"QGSA with it takes {both} GFLOPs at {loss} pp, QGSA alone {alone} at {more}, dense {dense}; alone, it"
    assert said in words


def test_the_results_page_holds_the_headline():
    assert (
        format_headline(read_rows("speed_256m_cpu"), read_rows("pareto_cards"), 2048)
        in (RESULTS / "README.md").read_text()
    )


def test_the_results_page_holds_the_flops_of_the_formula():
    results = json.loads((RESULTS / "flops.json").read_text())
    readme = (RESULTS / "README.md").read_text()
    assert results["paper"] == paper_table()
    for name, rows in results["answers"].items():
        for row in rows:
            parts = ("cross_modal_attention", "vision", "prefill", "decode", "total")
            flops = " | ".join(f"{row['flops'][part] / 1e9:.2f}" for part in parts)
            assert f"| {name} | {row['system']} | {flops} |" in readme


def test_all_results_are_told():
    assert {path.stem for path in RESULTS.glob("*.json")} == set(TABLES) | {"flops"}


@pytest.mark.parametrize(
    "page",
    [
        README,
        RESULTS / "README.md",
        HUB / "space" / "README.md",
        HUB / "browser" / "README.md",
        ROOT / "CONTRIBUTING.md",
    ],
)
def test_pages_name_only_files_that_exist(page):
    text = page.read_text()
    linked = [name.split("#")[0] for name in re.findall(r"\]\(([^):]+)\)", text)]
    named = re.findall(r"\b(?:training|modeling_qgsa|hub_cards|tests)/[\w/.-]*\w(?![\w{])", text)
    for name in filter(None, linked):
        assert (page.parent / name).exists(), name
    for name in named:
        assert (ROOT / name).exists(), name
    headings = {re.sub(r"[^\w -]", "", line.lower()).strip().replace(" ", "-") for line in HEADING.findall(text)}
    assert {name[1:] for name in re.findall(r"\]\((#[^)]+)\)", text)} <= headings


def snippets(text: str, language: str) -> list[str]:
    """Code blocks of a page in one language; shell blocks have none."""
    return [code for named, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M) if named == language]


def test_the_python_of_the_readme_runs_from_top_to_bottom(tmp_path, capsys):
    """All snippets in one session; the tiny dense checkpoint replaces the published one, which needs a network."""
    model = str(ROOT / "hub_cards" / "tiny-qgsa")
    export.export(export.ExportArguments(model, str(tmp_path / "qgsa")))
    scope = {"samples": [{**Cards("validation", 24)[number]} for number in range(24)]}
    code = snippets(README.read_text(), "python")
    assert len(code) == 8
    if find_spec("onnxruntime") is None:  # not part of every environment
        code = [snippet for snippet in code if "qgsa_onnx" not in snippet]
    else:
        export.export(export.ExportArguments(model, str(tmp_path / "onnx"), "onnx"))
    with serving(serve.make_app(*serve.load("hub_cards/tiny-qgsa"), serve.Limits())) as url:
        run_snippets([snippet.replace("http://127.0.0.1:8000", url) for snippet in code], scope, tmp_path)
    printed = capsys.readouterr().out.strip().splitlines()
    # The pair is twice the same model here, whose surest answers the guide gives alone.
    assert [line.split()[0] for line in printed[:4]] == ["moon", "encoder", "tensor([True])", "moon"]
    assert printed[4:] == ["moon 2"] * (len(code) - 7)  # the thumbnail and a tile
    assert printed[1].startswith("encoder tuned: ") and "'visual_tokens_dense': [272]" in printed[3]
    assert scope["pair"].guidance.exit_threshold is not None and (tmp_path / "pair" / "guidance.json").is_file()
    assert scope["picture"].size == scope["image"].size and scope["ids"].shape[0] == 1 and scope["loss"].isfinite()


def run_snippets(code, scope, tmp_path):
    for snippet in code:
        snippet = snippet.replace('"qgsa-smolvlm/', f'"{ROOT}/')
        snippet = snippet.replace("outputs/hub/qgsa-smolvlm-tiny", str(tmp_path / "qgsa"))
        snippet = snippet.replace("outputs/hub/onnx-tiny", str(tmp_path / "onnx"))
        snippet = snippet.replace("outputs/pair", str(tmp_path / "pair"))
        for size in ("256M", "500M"):
            snippet = snippet.replace(f"HuggingFaceTB/SmolVLM-{size}-Instruct", str(ROOT / "hub_cards" / "tiny-dense"))
        if "labels" in snippet:
            inputs = scope["processor"](text=scope["prompt"], images=[scope["image"]], return_tensors="pt")
            labels = inputs["input_ids"].clone()
            labels[:, :-2] = -100  # the last two tokens play the answer
            scope |= {"inputs": inputs, "labels": labels}
        exec(snippet, scope)


URLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
PARSERS = {
    "hub_cards/export.py": export.ExportArguments,
    "hub_cards/push_to_hub.py": push_to_hub.PushArguments,
    "hub_cards/serve.py": serve.ServeArguments,
    "hub_cards/serve_faults.py": serve_faults.FaultsArguments,
    "hub_cards/serve_load.py": serve_load.LoadArguments,
    "hub_cards/serve_throughput.py": serve_throughput.ThroughputArguments,
    "hub_cards/serve_ray_load.py": serve_ray_load.RayLoadArguments,
    "training/benchmark.py": BenchmarkArguments,
    "training/run_guided.py": (PairArguments, DataArguments, AnswerArguments),
    "training/studies/engines.py": EnginesArguments,
    "training/studies/growth.py": GrowthArguments,
    "training/studies/guided_speed.py": GuidedSpeedArguments,
    "training/studies/depth.py": DepthArguments,
    "training/studies/depth_speed.py": DepthSpeedArguments,
    "training/studies/adaptive.py": AdaptiveArguments,
    "training/studies/canvases.py": CanvasesArguments,
    "training/studies/pointing.py": PointingArguments,
    "training/studies/pareto.py": ParetoArguments,
}
PYTHONS = ("python", ".venv-ray/bin/python")
CPU = ["--use_cpu", "true"]
PRESET_PARSERS = {
    "training/run_qgsa.py": lambda given: (
        Parser(AnswersArguments).parse(given)
        if asks_for_answers(given)
        else parse_arguments([*given, *CPU], "", (TaskArguments, *GROUPS, QGSATrainingArguments))
    ),
    "training/run_stand_in.py": lambda given: parse_stand_in([*given, *CPU]),
    "training/run_visor.py": lambda given: parse_visor([*given, *CPU]),
    "training/studies/ablation.py": lambda given: parse_arguments(
        [*given, *CPU], "", (*GROUPS, QGSATrainingArguments)
    ),
}


@pytest.mark.parametrize("page", [README, RESULTS / "README.md"])
def test_the_commands_parse(page):
    """Every shell command: its target or script exists and accepts these arguments."""
    text = page.read_text()
    blocks = snippets(text, "") + re.findall(r"`(python [^`]+\.py[^`]*)`", text)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(re.sub(r"^QGSA_API_KEY=\S+ ", "", line), comments=True)
        if program == "make":
            assert subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True).returncode == 0, line
        elif program == "python" and arguments[0] in PRESET_PARSERS:
            PRESET_PARSERS[arguments[0]](arguments[1:])
        elif program in (".venv-ray/bin/serve", ".venv-ray/bin/ray"):
            assert all((ROOT / name).exists() for name in arguments if name.endswith(".yaml")), line
        elif program in PYTHONS and arguments[0] in PARSERS:
            Parser(PARSERS[arguments[0]]).parse(arguments[1:])
        elif program == "python" and arguments[0] != "-m":
            assert (ROOT / arguments[0]).exists(), line
        elif program in ("git", "pip"):
            assert [program, *arguments] in (
                ["git", "clone", URLS["Repository"]],
                ["pip", "install", "./qgsa-smolvlm"],
            )
        else:
            assert program in ("export", "hf", "lm_eval", ".venv-vllm/bin/python"), line
