"""Pictures of cards with several questions each, as conversations: most of the cost of a picture is shared by them."""

import numpy as np
import torch
from PIL import Image

from training.data.cards import (
    CANVAS,
    FAMILIES,
    RELATIONS,
    SPLITS,
    leave_one_out,
    make_question,
    make_scene,
    render,
)


# Relative frequencies. Families in which visual tokens have to be compared or placed are learnt last.
SHARES = {
    "count": 0.2,
    "presence": 0.08,
    "refer": 0.1,
    "open": 0.1,
    "verify": 0.1,
    "choice": 0.08,
    "find": 0.12,
    "locate": 0.2,
    "left": 0.1,
    "above": 0.1,
    "share": 0.12,
    "odd": 0.08,
}
ODD_SHARE = 0.3  # of the scenes, if the odd one out is asked for


class Conversations(torch.utils.data.Dataset):
    """Scenes of cards on the benchmark's canvas with several `turns` each, generated from their index.

    Args:
        split, seed: as for `Cards`.
        size: number of scenes.
        turns: number of questions about each.
        families: families to ask, from `FAMILIES` and `RELATIONS`, as often as `SHARES` says; those of the benchmark
            by default.

    Each item is a dict with `image` (PIL, RGB) and `turns`, dicts with `question` and `answer`. Raises ValueError for
    less than 1 turn and an unknown family.
    """

    def __init__(self, split: str, size: int, seed: int, turns: int, families=None):
        if turns < 1:
            raise ValueError(f"turns ({turns}) must be at least 1")
        self.split, self.size, self.seed, self.turns = split, size, seed, turns
        self.families = tuple(FAMILIES) if families is None else tuple(families)
        unknown = set(self.families) - set(FAMILIES) - set(RELATIONS)
        if unknown:
            raise ValueError(f"families ({', '.join(sorted(unknown))}): choose from {', '.join(FAMILIES | RELATIONS)}")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.size:
            raise IndexError(f"index ({index}) is out of range for {self.size} samples")
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), self.turns, index))
        cards = make_scene(rng, self.split, *CANVAS)
        if "odd" in self.families and rng.random() < ODD_SHARE:
            cards = leave_one_out(rng, cards, cards[0])
        shares = np.array([SHARES[family] for family in self.families])
        turns: list[dict] = []
        while len(turns) < self.turns:
            family = self.families[rng.choice(len(shares), p=shares / shares.sum())]
            turn = make_question(rng, family, cards, cards[rng.integers(len(cards))])
            if turn is not None:
                turns.append({"question": turn["question"], "answer": turn["answer"]})
        return {"image": Image.fromarray(render(rng, cards, *CANVAS)), "turns": turns}
