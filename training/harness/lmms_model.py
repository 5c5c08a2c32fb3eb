"""QGSA-SmolVLM as a model of lmms-eval, named `qgsa_smolvlm`.

    python training/harness/run_lmms_eval.py --model qgsa_smolvlm --model_args pretrained=FOLDER,max_tiles=4 \\
        --tasks qgsa_cards --include_path training/harness/lmms_eval_tasks --batch_size 16 --limit 32

It is registered by that script and not by an entry point: `training` is not part of the wheel, and one entry point
that cannot be imported makes lmms-eval skip those of other projects as well.
"""

import torch
from accelerate import PartialState
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from tqdm.auto import tqdm

from modeling_qgsa import QGSAProcessor, QGSASmolVLMForConditionalGeneration
from modeling_qgsa.configuration_qgsa import Budget
from modeling_qgsa.schedule_qgsa import schedule_of


MAX_NEW_TOKENS = 1024  # if the task sets none, as in lmms-eval's own models
MANIFEST = ModelManifest("qgsa_smolvlm", chat_class_path="training.harness.lmms_model.QGSASmolVLM")


class QGSASmolVLM(lmms):
    """Greedy answers, with images processed by PIL as in our evaluation.

    Args:
        pretrained: a QGSA checkpoint, Hub id or folder. It runs with this project's code, not the checkpoint's own.
        batch_size: number of questions per batch.
        device: such as `"cuda:1"`; by default this process's GPU, or the CPU.
        vision_budget: how vision takes part in the layers of the text model, such as 0.5 or "FFCC"; see `schedule_of`.
        budget: overrides of the checkpoint's selection and budgets, such as `max_tiles=4`; see `QGSAConfig`.

    Raises TypeError for an unknown budget option, ValueError for an invalid budget.
    """

    is_simple = False  # takes chat messages

    def __init__(
        self,
        pretrained: str,
        batch_size: int = 1,
        device: str | None = None,
        vision_budget: float | str | None = None,
        **budget,
    ):
        super().__init__()
        self.device = torch.device(device) if device else PartialState().device
        self.batch_size, self.budget = int(batch_size), budget
        model = QGSASmolVLMForConditionalGeneration.from_pretrained(pretrained)
        Budget.of(model.config, **budget)
        schedule_of(model.config, vision_budget)
        if vision_budget is not None:
            self.budget["vision_budget"] = vision_budget
        self.model = model.to(self.device).eval()
        self.processor = QGSAProcessor.from_pretrained(pretrained, backend="pil")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers to chat requests, in their order.

        Follows the `max_new_tokens` of a task, but not its `until`: the model ends its answers itself.
        Raises ValueError for a task with video or audio.
        """
        order = Collator(
            [request.args for request in requests],
            sort_fn=lambda arguments: arguments[3],  # document index
            group_fn=lambda arguments: arguments[2],  # generation options, shared by a batch
            grouping=True,
        )
        answers = []
        with tqdm(total=len(requests), desc="asking", disable=self.rank != 0) as progress:
            for batch in order.get_batched(n=self.batch_size):
                messages = [
                    ChatMessages(messages=to_messages(self.task_dict[task][split][number]))
                    for _, to_messages, _, number, task, split in batch
                ]
                answers += self.ask(messages, batch[0][2].get("max_new_tokens", MAX_NEW_TOKENS))
                progress.update(len(batch))
        return order.get_original(answers)

    @torch.no_grad()
    def ask(self, conversations: list[ChatMessages], max_new_tokens: int) -> list[str]:
        """The answers to a batch of conversations, at most `max_new_tokens` tokens each."""
        images = []
        for conversation in conversations:
            conversation_images, *other_media = conversation.extract_media()
            if any(other_media):
                raise ValueError("the task has video or audio: qgsa_smolvlm only takes images")
            images.append(conversation_images)
        texts = [
            self.processor.apply_chat_template(conversation.to_hf_messages(), add_generation_prompt=True)
            for conversation in conversations
        ]
        inputs = self.processor(
            text=texts,
            images=images if any(images) else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.device)
        output = self.model.generate(**inputs, **self.budget, do_sample=False, max_new_tokens=max_new_tokens)
        texts = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def loglikelihood(self, requests: list[Instance]):
        """Not supported: the tasks of `training/harness` only generate."""
        raise NotImplementedError("qgsa_smolvlm only generates (generate_until): it does not support loglikelihood")

    def generate_until_multi_round(self, requests: list[Instance]):
        """Not supported: the tasks of `training/harness` have a single round."""
        raise NotImplementedError("qgsa_smolvlm only generates in one round (generate_until)")
