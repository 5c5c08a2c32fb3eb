"""From a shorter prompt back to the positions that a caller counts in: hidden states, logits, labels.

At a position that was not kept stands what stands at the last kept one before it. So the loss over the whole prompt is
that of the shorter one: what comes next is predicted from what was seen. Sizes as in `layout_qgsa`; V is the size of
the vocabulary.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import pad

from .prompt_qgsa import check_shape


def columns_of_positions(keep_indices: torch.Tensor, length: int) -> torch.Tensor:
    """The column of the spliced prompt that stands for each position of the prompt, `(B, L)` int64.

    That of the position itself if it was kept, else of the last kept one before it; the first one if there is none.

    Args:
        keep_indices: `(B, L')` int64, as `splice` returns them.
        length: L, the number of positions of the prompt.
    """
    kept = keep_indices >= 0
    counts = torch.zeros(len(kept), length, dtype=torch.long, device=kept.device)
    counts = counts.scatter_add(1, keep_indices.clamp(min=0), kept.long()).cumsum(1)
    padding = (~kept).sum(1, keepdim=True)
    return padding + (counts - 1).clamp(min=0)


def take_columns(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Vectors of `values` `(B, n, D)` at `columns` `(B, k)`: `(B, k, D)`; `values` itself if these are all columns."""
    every = torch.arange(values.shape[1], device=columns.device)
    if columns.shape[1] == len(every) and (columns == every).all():  # logits would take their memory twice
        return values
    return values.gather(1, columns[..., None].expand(-1, -1, values.shape[-1]))


def labels_of_kept(labels: torch.Tensor, keep_indices: torch.Tensor) -> torch.Tensor:
    """Labels of the kept positions, `(B, L')`, -100 in the padding and right after it: padding predicts nothing.

    Args:
        labels: `(B, L)` int64.
        keep_indices: `(B, L')` int64, as `splice` returns them.
    """
    unpredicted = pad(keep_indices[:, :-1], (1, 0), value=-1) < 0
    return labels.gather(1, keep_indices.clamp(min=0)).masked_fill(unpredicted, -100)


def shift_labels_of_kept(shift_labels: torch.Tensor, keep_indices: torch.Tensor) -> torch.Tensor:
    """As `labels_of_kept` for `shift_labels` `(B, L)`, which hold at each position the label of the next one.

    The next kept position need not be the next one of the prompt: its label stands right before it there.
    """
    following = pad(keep_indices[:, 1:], (0, 1), value=shift_labels.shape[1])
    return shift_labels.gather(1, (following - 1).clamp(min=0)).masked_fill(keep_indices < 0, -100)


def read_out(
    head: Callable,
    loss_function: Callable,
    outputs,
    logits_to_keep: int | torch.Tensor,
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Step 7: logits at the positions of the prompt, and the loss over its labels.

    Only kept positions go through the language head.

    Args:
        head: from hidden states `(B, n, D)` to logits `(B, n, V)`.
        loss_function: called with `logits`, `labels` and `shift_labels`.
        outputs: a [`QGSABaseModelOutputWithPast`].
        logits_to_keep: number of positions at the end, 0 for all of them, or their indices.
        labels: `(B, L)` int64, or None for no loss; without a selection, of the positions of the logits alone, too.
        shift_labels: `(B, L)` int64, the labels of the next positions; made from `labels` by default.

    Raises ValueError, naming both shapes, if `shift_labels` are not those of the prompt.
    """
    hidden, selection = outputs.last_hidden_state, outputs.selection
    where = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    if selection is None:
        logits = every = head(hidden[:, where])
        if labels is not None and labels.shape[1] != every.shape[1]:
            every = head(hidden)
    else:
        kept = selection.keep_indices
        columns = columns_of_positions(kept, hidden.shape[1])[:, where]
        if labels is None and columns.shape[1] < kept.shape[1]:
            return head(hidden[:, where]), None
        every = head(take_columns(hidden, kept.clamp(min=0)))
        logits = take_columns(every, columns)
        labels = None if labels is None else labels_of_kept(labels, kept)
        if shift_labels is not None:
            check_shape("shift_labels", shift_labels, hidden.shape[:2], floating=False)
            shift_labels = shift_labels_of_kept(shift_labels, kept)
    if labels is None:
        return logits, None
    shifted = {} if shift_labels is None else {"shift_labels": shift_labels}
    return logits, loss_function(logits=every, labels=labels, **shifted)
