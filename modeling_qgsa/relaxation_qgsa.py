"""The prefill in training, with a relaxed selection. Sizes as in `selection_qgsa`."""

import torch

from .configuration_qgsa import Budget
from .prompt_qgsa import Prompt
from .selection_qgsa import (
    SelectedInputs,
    describe_selection,
    gated_attention_mask,
    gates_of_positions,
    positions_to_keep,
    rank_tokens,
    relaxed_top_k,
    splice,
    to_tiles,
)
from .vision_qgsa import Views


class RelaxedPrefill:
    """What [`QGSASmolVLMModel`] does in training in the place of `select_inputs`, with the same steps."""

    def relax_inputs(
        self, budget: Budget, prompt: Prompt, views: Views, question_mask=None, temperature=1.0
    ) -> SelectedInputs:
        """The prefill in training: random budgets, and a gate on the attention keys in the place of top-k.

        Each image gets a budget between its minimum and maximum, so that the text model learns to read all of them.
        The tokens of its m most relevant tiles are spliced, and each is gated by the relaxed selection of k:
        gradients of the answer reach the selector through the gates. All tiles are encoded, for the teachers. The
        selection that is reported is the hard one that the same scores make.
        """
        glance = self.glance_and_point(prompt, views, question_mask)
        layout, (m, k) = glance.layout, budget.resolve(torch.rand_like(glance.complexity))
        looked = self.choose(budget.selection, glance, m, k)
        every, tiles = torch.ones_like(looked), looked.any(1)
        if budget.selection == "blocks":  # whole tiles are for the teachers then
            with torch.no_grad():
                features = self.look(glance, views, every)
            seen = self.look(glance, views, looked)
        else:
            features = self.look(glance, views, every)
            seen = features[tiles]
        scores = self.score_tokens(glance, seen, tiles)
        kept = self.keep(glance, scores, looked, k)
        everywhere = scores.new_zeros(looked.shape).index_put((tiles,), scores)
        gates = to_tiles(relaxed_top_k(*rank_tokens(everywhere, looked, layout), k, temperature), layout)

        embeds = self.embed(prompt.input_ids, layout, seen, tiles)
        (embeds, mask, positions, log_gates), keep_indices = splice(
            positions_to_keep(prompt.attention_mask, layout, looked),
            (embeds, 0.0),
            (prompt.attention_mask, 0),
            (prompt.position_ids, 0),
            (gates_of_positions(gates, layout).to(embeds.dtype), 0.0),
        )
        mask = gated_attention_mask(mask, log_gates)
        selection = describe_selection(layout, kept, tiles, glance.relevance, glance.complexity, keep_indices)
        return SelectedInputs(embeds, mask, positions, selection, glance, features)
