"""The evaluation of trained variants: one row per variant from those of its seeds."""

import numpy as np
import pytest
from transformers import TrainingArguments

from training.cli.groups import EvaluationArguments
from training.data.cards import Cards
from training.studies import ablation


def test_a_variant_is_the_mean_of_its_seeds(monkeypatch, model, make_dense, processor, tmp_path):
    monkeypatch.setattr(ablation, "SEEDS", (1, 2))
    monkeypatch.setattr(ablation, "VARIANTS", {"answer only": (), "+ utility": ("utility_weight",)})
    for name in ablation.VARIANTS:
        for seed in ablation.SEEDS:
            model.save_pretrained(ablation.folder_of(tmp_path, name, seed))
    evaluation, args = EvaluationArguments(max_new_tokens=2), TrainingArguments(use_cpu=True, output_dir=str(tmp_path))
    rows = ablation.evaluate_variants("cards", evaluation, args, make_dense(), processor, Cards("test", 4))
    assert [row["variant"] for row in rows] == list(ablation.VARIANTS)
    for row in rows:
        assert [seed["system"] for seed in row["seeds"]] == [f"{row['variant']}, seed {seed}" for seed in (1, 2)]
        assert row["delta_vs_dense_pp"] == pytest.approx(np.mean(row["by_seed_pp"]))
    assert len(ablation.format_ablation(rows).splitlines()) == 4
