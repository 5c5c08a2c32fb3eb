"""The two trained modules of question-guided selection: one scores places and tokens, one sets the budget."""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.smolvlm.modeling_smolvlm import eager_attention_forward

from .compat_qgsa import bidirectional_mask
from .compat_qgsa import initialization as init
from .configuration_qgsa import QGSAConfig
from .selection_qgsa import splice


# Up to version 0.2 the layers were those of torch, whose attention has no module for its first projection.
FORMER_NAMES = {
    "self_attn.in_proj_weight": "self_attn.in_proj.weight",
    "self_attn.in_proj_bias": "self_attn.in_proj.bias",
}


class SelectorAttention(nn.Module):
    """Self-attention in both directions through transformers' attention interface."""

    is_causal = False

    def __init__(self, config: QGSAConfig):
        super().__init__()
        self.config = config
        self.heads = config.selector_heads
        self.scaling = (config.selector_hidden_size // config.selector_heads) ** -0.5
        self.in_proj = nn.Linear(config.selector_hidden_size, 3 * config.selector_hidden_size)
        self.out_proj = nn.Linear(config.selector_hidden_size, config.selector_hidden_size)

    def forward(self, hidden: torch.Tensor, mask) -> torch.Tensor:
        """Attend, `(I, L, D)` to `(I, L, D)`; `mask` as the attention implementation expects it."""
        parts = self.in_proj(hidden).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager_attention_forward)
        attended, _ = attend(self, query, key, value, mask, dropout=0.0, scaling=self.scaling, is_causal=False)
        return self.out_proj(attended.flatten(2))


class SelectorLayer(nn.Module):
    """A pre-norm transformer layer whose weights are all used by calling their modules.

    `nn.TransformerEncoderLayer` reads the weights of its children without calling them: adapters, offloading and
    quantization, which all act on calls, would be ignored or fail. Names and mathematics are those of that class.
    """

    def __init__(self, config: QGSAConfig):
        super().__init__()
        width = config.selector_hidden_size
        self.self_attn = SelectorAttention(config)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, hidden: torch.Tensor, mask) -> torch.Tensor:
        """Hidden states `(I, L, D)` of the next layer; `mask` as in [`SelectorAttention`]."""
        hidden = hidden + self.self_attn(self.norm1(hidden), mask)
        return hidden + self.linear2(nn.functional.gelu(self.linear1(self.norm2(hidden))))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # `from_pretrained` renames by itself; `load_state_dict`, which Trainer uses to resume, comes here.
        for former, name in FORMER_NAMES.items():
            if prefix + former in state_dict:
                state_dict[prefix + name] = state_dict.pop(prefix + former)
        super()._load_from_state_dict(state_dict, prefix, *args)


class QuestionGuidedSelector(nn.Module):
    """Scores every place of an image from its glance and the question (QGSA, section 3).

    A small transformer reads the cells of the glance and the words of the question together; it predicts which cells
    are relevant, and with which words the visual tokens should be matched.

    Args:
        config: sizes of the selector, of the text model, whose word embeddings and connector features it reads, and of
            the glance; the attention implementation is the model's.
    """

    def __init__(self, config: QGSAConfig):
        super().__init__()
        self.config = config
        self.max_question_tokens = config.max_question_tokens
        width, hidden_size = config.text_config.hidden_size, config.selector_hidden_size
        self.glance_projection = nn.Linear(width, hidden_size)
        self.question_projection = nn.Linear(width, hidden_size)
        self.glance_norm = nn.LayerNorm(width)
        self.question_norm = nn.LayerNorm(width)
        self.cell_position = nn.Parameter(torch.empty(config.tokens_per_tile, hidden_size))
        self.word_position = nn.Parameter(torch.empty(config.max_question_tokens, hidden_size))
        self.layers = nn.ModuleList(SelectorLayer(config) for _ in range(config.selector_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.relevance = nn.Linear(hidden_size, 1)
        self.word_weight = nn.Linear(hidden_size, 1)
        self.query = nn.Linear(width, 2 * hidden_size)
        self.tile_key = nn.Linear(width, hidden_size)
        self.glance_key = nn.Linear(width, hidden_size)
        self.init_weights()

    def init_weights(self):
        """Start from content alone: places have no influence yet, and words match the tokens that resemble them.

        With larger initial position embeddings, the selector learns where things usually are before it reads the
        question.
        """
        init.zeros_(self.cell_position)
        init.zeros_(self.word_position)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init.normal_(module.weight, std=module.in_features**-0.5)
        for module in self.modules():
            if isinstance(module, SelectorAttention):  # half the variance, as in torch: attention starts out gently
                init.normal_(module.in_proj.weight, std=(2 * module.in_proj.in_features) ** -0.5)
        for key, query in zip((self.tile_key, self.glance_key), self.query.weight.detach().chunk(2)):
            init.copy_(key.weight, query)
        init.zeros_(self.word_weight.weight)

    def forward(
        self, question: torch.Tensor, question_mask: torch.Tensor, glance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict the relevant cells and summarize the question.

        Args:
            question: `(I, Q, D)` word embeddings, padded anywhere.
            question_mask: `(I, Q)` bool.
            glance: `(I, C, D)`, features of the encoded global view.

        Returns `(relevance, question_state)`: log-probabilities of the cells, `(I, C)` float32, and the weighted mean
        of the question's normalised word embeddings, `(I, D)`.

        Raises ValueError in eval mode if the selector was never trained.
        """
        if not self.training:
            self.check_trained()
        (question,), indices = splice(question_mask, (question, 0.0))
        return self.read(
            question[:, -self.max_question_tokens :], indices[:, -self.max_question_tokens :] >= 0, glance
        )

    def check_trained(self):
        """Raise ValueError if the selector was never trained."""
        if not self.cell_position.any():  # 0 until the first step, see `init_weights`
            raise ValueError(
                'pointer ("selector"): the selector of this model was never trained, and would choose at random. Use '
                'pointer="attention", which needs no training and is sharpened by model.calibrate(samples, '
                "processor), or train it with training/run_qgsa.py"
            )

    def read(
        self, question: torch.Tensor, is_word: torch.Tensor | None, glance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward`, from the words of the question alone, at most `max_question_tokens` of them.

        Args:
            question: `(I, Q, D)`, padded on the left.
            is_word: `(I, Q)` bool, False for padding; None without padding.
            glance: `(I, C, D)`.
        """
        question = self.question_norm(question)
        words = self.question_projection(question)
        words = words + self.word_position[: words.shape[1]].flip(0)
        cells = self.glance_projection(self.glance_norm(glance)) + self.cell_position
        hidden = torch.cat([cells, words], dim=1)
        mask = None
        if is_word is not None:
            present = torch.cat([is_word.new_ones(cells.shape[:2]), is_word], dim=1)
            mask = bidirectional_mask(self.config, hidden, present)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        hidden = self.norm(hidden)
        cells, words = hidden[:, : cells.shape[1]], hidden[:, cells.shape[1] :]
        weights = self.word_weight(words).float()
        if is_word is not None:
            weights = weights.masked_fill(~is_word[..., None], float("-inf"))
        weights = weights.softmax(1)
        relevance = self.relevance(cells)[..., 0].float().log_softmax(-1)
        return relevance, (question * weights.to(question.dtype)).sum(1)

    def match_tokens(
        self, question_state: torch.Tensor, features: torch.Tensor, is_global: torch.Tensor
    ) -> torch.Tensor:
        """How well visual tokens match the question, `(n, P)` float32.

        Args:
            question_state: `(n, D)`, the question of each tile's image.
            features: `(n, P, D)`, the tokens as the text model gets them.
            is_global: `(n,)` bool; global views and tiles have separate keys.
        """
        tile_query, glance_query = self.query(question_state)[:, None].chunk(2, dim=-1)
        features = self.glance_norm(features)
        match = torch.where(
            is_global[:, None],
            (self.glance_key(features) * glance_query).sum(-1),
            (self.tile_key(features) * tile_query).sum(-1),
        )
        return match.float() / self.tile_key.out_features**0.5


class ComplexityEstimator(nn.Module):
    """Predicts how much of an image a question needs, from its words and the glance (adaptive sparsity, QGSA).

    For each of several complexities, evenly spaced from 0 to 1, it predicts the probability of being the lowest that
    suffices: similar questions can need different budgets, and a mean would serve none of them.

    Args:
        config: its hidden size and number of levels, and the width D of the text model, whose word embeddings and
            connector features it reads.
    """

    def __init__(self, config: QGSAConfig):
        super().__init__()
        width, hidden_size = config.text_config.hidden_size, config.selector_hidden_size
        self.question_norm = nn.LayerNorm(width)
        self.glance_norm = nn.LayerNorm(width)
        self.network = nn.Sequential(
            nn.Linear(2 * width, hidden_size), nn.GELU(), nn.Linear(hidden_size, config.complexity_levels)
        )

    def forward(self, question: torch.Tensor, question_mask: torch.Tensor, glance: torch.Tensor) -> torch.Tensor:
        """Logits of the levels, `(I, levels)` float32; arguments as for `QuestionGuidedSelector.forward`."""
        present = question_mask[..., None].to(question.dtype)
        words = (question * present).sum(1) / present.sum(1)
        pooled = torch.cat([self.question_norm(words), self.glance_norm(glance.mean(1))], dim=-1)
        return self.network(pooled).float()
