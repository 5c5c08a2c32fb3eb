"""Arguments of the trainer: those of `transformers.TrainingArguments`, and those of the losses of selection."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from training.cli.groups import EvaluationArguments, FeatureArguments, ModelArguments, SelectionArguments
from training.data.arguments import DataArguments


@dataclass
class LossArguments:
    """The losses of question-guided selection, and their schedules."""

    _argument_group_name = "losses"

    start_temperature: float = field(default=1.0, metadata={"help": "First Gumbel temperature."})
    end_temperature: float = field(default=0.1, metadata={"help": "Last Gumbel temperature."})
    answer_weight: float = field(default=1.0, metadata={"help": "Weight of the answer loss."})
    utility_weight: float = field(default=1.0, metadata={"help": "Weight of the utility teacher; 0 disables it."})
    utility_temperature: float = field(default=0.5, metadata={"help": "Its softmax temperature."})
    attention_weight: float = field(default=1.0, metadata={"help": "Weight of the attention teacher; 0 disables it."})
    attention_share: float = field(default=0.25, metadata={"help": "Share of a batch that it sees."})
    neutral_question: str | None = field(
        default=None,
        metadata={"help": "Divide the teacher's attention by the attention under this question."},
    )
    contrastive_weight: float = field(
        default=0.0, metadata={"help": "Weight of contrastive patch selection; 0 disables it."}
    )
    patch_word_weight: float = field(default=0.0, metadata={"help": "Weight of patch-word alignment; 0 disables it."})
    patch_word_temperature: float = field(default=0.5, metadata={"help": "Its softmax temperature."})
    complexity_weight: float = field(default=0.1, metadata={"help": "Weight of the complexity loss; 0 disables it."})
    complexity_learning_rate: float = field(default=3e-3, metadata={"help": "Learning rate of the estimator."})
    adapter_learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate of the adapters."})
    complexity_start: float = field(default=0.4, metadata={"help": "Share of the steps before its loss."})
    complexity_tolerance: float = field(
        default=0.1,
        metadata={"help": "Largest drop below dense in mean answer-token probability at a sufficient budget."},
    )
    target_visual_tokens: float | None = field(
        default=None, metadata={"help": "Mean number of visual tokens per image to aim at."}
    )
    budget_weight: float = field(default=1.0, metadata={"help": "Weight of missing that target."})
    distillation_steps: int = field(
        default=0, metadata={"help": "Steps that teach the encoder the smaller glance first."}
    )
    distillation_learning_rate: float = field(default=5e-4, metadata={"help": "Learning rate of these steps."})


@dataclass
class QGSATrainingArguments(LossArguments, TrainingArguments):
    """Arguments of [`QGSATrainer`]: `transformers.TrainingArguments` and [`LossArguments`]."""

    _argument_group_name = "losses and transformers.TrainingArguments"


GROUPS = (ModelArguments, DataArguments, SelectionArguments, EvaluationArguments, FeatureArguments)
