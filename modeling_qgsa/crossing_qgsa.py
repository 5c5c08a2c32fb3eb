"""Blocks of cross-attention in front of the layers of the text model: how VISOR (CVPR 2026) looks at visual tokens.

With `vision_cross="block"`, a cross layer of a schedule runs on text alone, behind a block in which the text attends
to the visual tokens. VISOR's initial weights are not published, nor all of its sizes: these are ours. Sizes as in
`layout_qgsa`; in addition W is the width of a block, n a number of visual tokens, and L one of text tokens.
"""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.smolvlm.modeling_smolvlm import eager_attention_forward

from .compat_qgsa import initialization as init
from .configuration_qgsa import QGSAConfig
from .schedule_qgsa import BLOCK_KERNEL, block_size


def places_apart(columns: torch.Tensor, margin: int) -> torch.Tensor:
    """Places with a gap of `margin` between runs of neighbouring columns, `(B, n)` int64, for `convolve`.

    Args:
        columns: `(B, n)` int64, ascending; -1 in the padding on the left.
    """
    starts = (columns[:, 1:] != columns[:, :-1] + 1) & (columns[:, :-1] >= 0)
    gaps = margin * nn.functional.pad(starts, (1, 0)).cumsum(1)
    return torch.arange(columns.shape[1], device=columns.device) + gaps


def convolve(conv: nn.Conv1d, states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """A convolution over `states` `(B, n, C)` at some `places` `(B, n)`, with zeros at all others: `(B, n, C)`."""
    where = places[..., None].expand_as(states)
    apart = states.new_zeros(len(states), int(places.max()) + 1, states.shape[2]).scatter(1, where, states)
    return conv(apart.transpose(1, 2)).transpose(1, 2).gather(1, where)


class VisionBlock(nn.Module):
    """Text attends to visual tokens, through a gate that is closed at first.

    Keys and values have no rotary embeddings: where a visual token is, a depthwise convolution tells. It stays within
    a tile, whose tokens follow each other in the prompt: across tiles, words between them would see what comes later.

    Args:
        config: sizes of the text model, whose attention implementation runs here, too.
    """

    is_causal = False

    def __init__(self, config: QGSAConfig):
        super().__init__()
        self.config = text = config.text_config
        self.heads, head = block_size(text)
        self.scaling, width = head**-0.5, self.heads * head
        self.text_norm = nn.RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.visual_norm = nn.RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.query = nn.Linear(text.hidden_size, width, bias=False)
        self.key_value = nn.Linear(text.hidden_size, 2 * width, bias=False)
        self.conv = nn.Conv1d(
            2 * width, 2 * width, BLOCK_KERNEL, padding=BLOCK_KERNEL // 2, groups=2 * width, bias=False
        )
        self.output = nn.Linear(width, text.hidden_size, bias=False)
        self.gate = nn.Parameter(torch.empty(1))
        self.gate_scale = text.hidden_size**0.5  # Adam moves all weights alike: else the gate opens last by far
        self.init_weights()

    def init_weights(self):
        """Start with a closed gate, and from content alone: places have no influence yet."""
        for linear in (self.query, self.key_value, self.output):
            init.normal_(linear.weight, std=linear.in_features**-0.5)
        init.zeros_(self.conv.weight)
        init.zeros_(self.gate)

    @property
    def is_trained(self) -> bool:
        """Whether the gate has opened."""
        return bool(self.gate.any())

    def places(self, columns: torch.Tensor) -> torch.Tensor:
        """Places of visual tokens for the convolution, see `places_apart`."""
        return places_apart(columns, BLOCK_KERNEL // 2)

    def read(self, visual: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, `(B, heads, n, W / heads)` each, of `visual` `(B, n, D)`, which is 0 in the padding."""
        states = self.key_value(self.visual_norm(visual))
        states = states + convolve(self.conv, states, places)
        keys, values = states.unflatten(-1, (2 * self.heads, -1)).transpose(1, 2).chunk(2, dim=1)
        return keys, values

    def forward(
        self,
        text: torch.Tensor,
        mask: torch.Tensor | None,
        sees: torch.Tensor,
        held: tuple[torch.Tensor, torch.Tensor] | None = None,
        visual: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Let the text look: its hidden states, `(B, L, D)`, and the keys and values of all visual tokens.

        Args:
            text: `(B, L, D)`.
            mask: `(B, 1, L, n)`, what is added to the attention to all visual tokens; None for nothing.
            sees: `(B, L)` bool; text tokens that see no visual token stay as they are.
            held: keys and values of earlier visual tokens, as returned.
            visual: new visual tokens and their places, as in `read`; None if there are none.
        """
        known = [] if held is None else [held]
        if visual is not None:
            known.append(self.read(*visual))
        keys, values = known[0] if len(known) == 1 else (torch.cat(pair, 2) for pair in zip(*known))
        query = self.query(self.text_norm(text)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager_attention_forward)
        attended, _ = attend(self, query, keys, values, mask, dropout=0.0, scaling=self.scaling, is_causal=False)
        added = (self.gate * self.gate_scale).tanh() * self.output(attended.flatten(2))
        return text + added.masked_fill(~sees[..., None], 0.0), (keys, values)


def blocks_zero(blocks: nn.ModuleList | None, hidden: torch.Tensor) -> torch.Tensor:
    """0, through which every weight of the blocks gets a gradient: 0. As `pointer_zero`, for DDP.

    Args:
        blocks: None gives 0 without any.
        hidden: `(..., D)`, gives dtype and device.
    """
    blank = hidden.new_zeros(1, 1, hidden.shape[-1])
    sees = torch.ones_like(blank[..., 0], dtype=torch.bool)
    visual = (blank, torch.zeros_like(sees, dtype=torch.long))
    outputs = [block(blank, None, sees, visual=visual)[0].flatten()[:0].sum() for block in blocks or ()]
    return sum(outputs, hidden.new_zeros(()))
