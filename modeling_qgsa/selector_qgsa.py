"""The two trained modules of question-guided selection: one scores places and tokens, one sets the budget."""

import torch
from torch import nn

from .compat_qgsa import initialization as init
from .selection_qgsa import splice


class QuestionGuidedSelector(nn.Module):
    """Scores every place of an image from its glance and the question (QGSA, section 3).

    A small transformer reads the cells of the glance and the words of the question together; it predicts which cells
    are relevant, and with which words the visual tokens should be matched.

    Args:
        width: D of the text model, whose word embeddings and connector features it reads.
        cells: C, the number of cells of the glance.
        hidden_size, layers, heads, max_question_tokens: as in [`QGSAConfig`].
    """

    def __init__(self, width: int, cells: int, hidden_size: int, layers: int, heads: int, max_question_tokens: int):
        super().__init__()
        self.max_question_tokens = max_question_tokens
        self.glance_projection = nn.Linear(width, hidden_size)
        self.question_projection = nn.Linear(width, hidden_size)
        self.glance_norm = nn.LayerNorm(width)
        self.question_norm = nn.LayerNorm(width)
        self.cell_position = nn.Parameter(torch.empty(cells, hidden_size))
        self.word_position = nn.Parameter(torch.empty(max_question_tokens, hidden_size))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden_size, heads, 4 * hidden_size, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
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
        """
        (question,), indices = splice(question_mask, (question, 0.0))
        question, indices = question[:, -self.max_question_tokens :], indices[:, -self.max_question_tokens :]
        question = self.question_norm(question)
        words = self.question_projection(question)
        words = words + self.word_position[: words.shape[1]].flip(0)
        cells = self.glance_projection(self.glance_norm(glance)) + self.cell_position
        hidden = torch.cat([cells, words], dim=1)
        padding = torch.cat([indices.new_zeros(cells.shape[:2], dtype=torch.bool), indices < 0], dim=1)
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=padding)
        hidden = self.norm(hidden)
        cells, words = hidden[:, : cells.shape[1]], hidden[:, cells.shape[1] :]
        weights = self.word_weight(words).float().masked_fill((indices < 0)[..., None], float("-inf")).softmax(1)
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
        width: D of the text model, whose word embeddings and connector features it reads.
        hidden_size: width of its hidden layer.
        levels: number of complexities that it distinguishes.
    """

    def __init__(self, width: int, hidden_size: int, levels: int):
        super().__init__()
        self.question_norm = nn.LayerNorm(width)
        self.glance_norm = nn.LayerNorm(width)
        self.network = nn.Sequential(nn.Linear(2 * width, hidden_size), nn.GELU(), nn.Linear(hidden_size, levels))

    def forward(self, question: torch.Tensor, question_mask: torch.Tensor, glance: torch.Tensor) -> torch.Tensor:
        """Logits of the levels, `(I, levels)` float32; arguments as for `QuestionGuidedSelector.forward`."""
        present = question_mask[..., None].to(question.dtype)
        words = (question * present).sum(1) / present.sum(1)
        pooled = torch.cat([self.question_norm(words), self.glance_norm(glance.mean(1))], dim=-1)
        return self.network(pooled).float()
