"""Worker that applies chat templates, one conversation per job; `serve_templates` starts it, see `serve_workers`.

A job has the arguments of transformers' `render_jinja_template`. The result is the prompt as UTF-8, or an `error`.
"""

from serve_workers import work
from transformers.utils.chat_template_utils import render_jinja_template


def render(job: dict, _: bytes) -> tuple[dict, bytes]:
    """Apply a template, which raises errors of any type; memory errors end the worker."""
    try:
        (prompt,), _ = render_jinja_template(**job)
        return {}, prompt.encode()
    except MemoryError:
        raise
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}, b""


if __name__ == "__main__":
    work(render)
