"""QGSA-SmolVLM as a model of lmms-eval, named `qgsa_smolvlm`; lmms-eval finds it where this project is installed.

    python -m lmms_eval --model qgsa_smolvlm --model_args pretrained=FOLDER,max_tiles=4,max_visual_tokens=64 \\
        --tasks qgsa_cards --include_path training/harness/lmms_eval_tasks --batch_size 16 --limit 32

The tasks that come with lmms-eval can be asked as well, as long as they show images.
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


MAX_NEW_TOKENS = 1024  # where a task does not say, as for lmms-eval's own models
MANIFEST = ModelManifest("qgsa_smolvlm", chat_class_path="training.harness.lmms_model.QGSASmolVLM")


class QGSASmolVLM(lmms):
    """Answers greedily, on pixels of PIL as our evaluation does.

    Args:
        pretrained: a QGSA checkpoint, Hub id or folder. The code is that of this project, not the checkpoint's own.
        batch_size: questions asked at once.
        device: such as `"cuda:1"`; by default this process's GPU, or the CPU.
        budget: overrides of the checkpoint's selection and budgets, such as `max_tiles=4`; see `QGSAConfig`.

    Raises TypeError for an unknown budget and ValueError for one that cannot be kept.
    """

    is_simple = False  # takes chat messages

    def __init__(self, pretrained: str, batch_size: int = 1, device: str | None = None, **budget):
        super().__init__()
        self.device = torch.device(device) if device else PartialState().device
        self.batch_size, self.budget = int(batch_size), budget
        model = QGSASmolVLMForConditionalGeneration.from_pretrained(pretrained)
        Budget.of(model.config, **budget)
        self.model = model.to(self.device).eval()
        self.processor = QGSAProcessor.from_pretrained(pretrained, backend="pil")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers to chat requests, in their order.

        `max_new_tokens` of a task is followed; `until` is not, since the model ends its answers itself.
        Raises ValueError for a task that shows video or sound.
        """
        order = Collator(
            [request.args for request in requests],
            sort_fn=lambda arguments: arguments[3],  # the document's number
            group_fn=lambda arguments: arguments[2],  # the generation options, which a batch has in common
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
            shown, *others = conversation.extract_media()
            if any(others):
                raise ValueError("the task shows video or sound, and qgsa_smolvlm takes images alone")
            images.append(shown)
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
        """Not offered: the tasks of `training/harness` ask for answers."""
        raise NotImplementedError("qgsa_smolvlm answers questions (generate_until), and gives no likelihoods")

    def generate_until_multi_round(self, requests: list[Instance]):
        """Not offered, as above."""
        raise NotImplementedError("qgsa_smolvlm answers questions (generate_until), in one round")
