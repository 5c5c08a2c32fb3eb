"""The task class of `lmms_eval_tasks`, which differs from lmms-eval's own in the source of its documents."""

from lmms_eval.api.task import ConfigurableMessagesTask

from training.harness.documents import load


class QGSATask(ConfigurableMessagesTask):
    """A task whose documents come from `training.harness.documents.load`, by the name in `dataset_kwargs`.

    For models that take chat messages, as most models of lmms-eval do.
    """

    def __init__(self, config: dict):
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def download(self, dataset_kwargs: dict):
        """Load the documents; lmms-eval would look for them on the Hub or in local files."""
        self.dataset = self.dataset_no_image = load(**dataset_kwargs)
