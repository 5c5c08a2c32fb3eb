"""The tasks of `lmms_eval_tasks`: as lmms-eval's own, but for where the documents come from."""

from lmms_eval.api.task import ConfigurableMessagesTask

from training.harness.documents import load


class QGSATask(ConfigurableMessagesTask):
    """A task whose documents are those of `training.harness.documents.load`, by the name in `dataset_kwargs`.

    For models that take chat messages, which most of lmms-eval's do.
    """

    def __init__(self, config: dict):
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def download(self, dataset_kwargs: dict):
        """lmms-eval loads from the Hub or from files here."""
        self.dataset = self.dataset_no_image = load(**dataset_kwargs)
