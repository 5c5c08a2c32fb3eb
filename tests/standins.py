"""Trainer's arguments for a few steps of a stand-in."""

from transformers import TrainingArguments


def arguments(tmp_path, **changes):
    return TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=50,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        **{"save_strategy": "no", "logging_steps": 1, **changes},
    )
