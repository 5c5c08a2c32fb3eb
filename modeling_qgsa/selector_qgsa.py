"""The two small modules of question-guided selection: what makes the scores, and what sets the budget."""

import torch
from torch import nn

from .selection_qgsa import splice


class QuestionGuidedSelector(nn.Module):
    """Scores every place of an image from its glance and the question (QGSA, section 3).

    A small transformer reads the cells of the glance and the words of the question together.

    Args:
        width: D of the text model, whose embeddings and connector features it reads.
        cells: C, cells of the glance.
        hidden_size, layers, heads, max_question_tokens: its own size.
    """

    def __init__(self, width: int, cells: int, hidden_size: int, layers: int, heads: int, max_question_tokens: int):
        super().__init__()
        self.max_question_tokens = max_question_tokens
        self.glance_projection = nn.Linear(width, hidden_size)
        self.question_projection = nn.Linear(width, hidden_size)
        self.glance_norm = nn.LayerNorm(width)
        self.question_norm = nn.LayerNorm(width)
        self.cell_position = nn.Embedding(cells, hidden_size)
        self.word_position = nn.Embedding(max_question_tokens, hidden_size)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden_size, heads, 4 * hidden_size, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.relevance = nn.Linear(hidden_size, 1)
        self.query = nn.Linear(hidden_size, 2 * hidden_size)
        self.tile_key = nn.Linear(width, hidden_size)
        self.glance_key = nn.Linear(width, hidden_size)

    def forward(
        self, question: torch.Tensor, question_mask: torch.BoolTensor, glance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Point.

        Args:
            question: `(I, Q, D)` word embeddings, padded anywhere.
            question_mask: `(I, Q)` bool.
            glance: `(I, C, D)` features of the encoded global view.

        Returns `(relevance, question_state, glance_state)`: log-probabilities of the cells `(I, C)`, and the pooled
        question and glance, `(I, hidden_size)` each.
        """
        (question,), indices = splice(question_mask, (question, 0.0))
        question, indices = question[:, -self.max_question_tokens :], indices[:, -self.max_question_tokens :]
        words = self.question_projection(self.question_norm(question))
        words = words + self.word_position.weight[: words.shape[1]].flip(0)
        cells = self.glance_projection(self.glance_norm(glance)) + self.cell_position.weight
        hidden = torch.cat([cells, words], dim=1)
        padding = torch.cat([indices.new_zeros(cells.shape[:2], dtype=torch.bool), indices < 0], dim=1)
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=padding)
        hidden = self.norm(hidden)
        cells, words = hidden[:, : cells.shape[1]], hidden[:, cells.shape[1] :]
        present = (indices >= 0)[..., None].to(words.dtype)
        relevance = self.relevance(cells)[..., 0].float().log_softmax(-1)
        return relevance, (words * present).sum(1) / present.sum(1), cells.mean(1)

    def score_tokens(
        self, question_state: torch.Tensor, relevance: torch.Tensor, features: torch.Tensor, is_global: torch.Tensor
    ) -> torch.Tensor:
        """Scores of visual tokens, `(n, P)`: how relevant their place is, and how well they match the question.

        Args:
            question_state: `(n, hidden_size)`, the question of each tile.
            relevance: `(n, P)`, log-probability of each token's cell.
            features: `(n, P, D)`, the tokens as the text model gets them.
            is_global: `(n,)` bool; glances and tiles are matched by keys of their own.
        """
        tile_query, glance_query = self.query(question_state)[:, None].chunk(2, dim=-1)
        features = self.glance_norm(features)
        match = torch.where(
            is_global[:, None],
            (self.glance_key(features) * glance_query).mean(-1),
            (self.tile_key(features) * tile_query).mean(-1),
        )
        return relevance + match.to(relevance.dtype)


class ComplexityEstimator(nn.Module):
    """How much of an image a question needs, 0 to 1, from the pooled question and glance (adaptive sparsity, QGSA)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.network = nn.Sequential(
            nn.LayerNorm(2 * hidden_size),
            nn.Linear(2 * hidden_size, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, 1),
        )

    def forward(self, question_state: torch.Tensor, glance_state: torch.Tensor) -> torch.Tensor:
        """Map two `(I, hidden_size)` to the complexity, `(I,)` float32."""
        return self.network(torch.cat([question_state, glance_state], dim=-1))[:, 0].float().sigmoid()
