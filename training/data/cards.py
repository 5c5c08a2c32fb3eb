"""Cards: a generated visual question answering benchmark whose answers are only visible in the high-resolution tiles.

Coloured cards lie on a cluttered canvas, at most one per tile. The thumbnail shows the colour of a card, but not the
figure on it. The question families follow three real data sets and differ in the number of tiles that they need:

=========  =========================================  ==================  ======  =======================
family     question                                   answer              tiles   modelled on
=========  =========================================  ==================  ======  =======================
count      how many cards are there?                  4                   none    VQA-RAD, open
presence   is there a red card?                       yes / no            none    VQA-RAD, closed
refer      where is the red card?                     row 2 column 3      none    RefCOCO
open       what shape is on the red card?             star                one     VQA-RAD, open
verify     does the red card show a star?             yes / no            one     VQA-RAD, closed
choice     ... choose from star, moon, ...            star                one     A-OKVQA, multiple choice
find       which colour is the card with the star?    red                 many    VQA-RAD, open
locate     where is the card with the star?           row 2 column 3      many    RefCOCO
=========  =========================================  ==================  ======  =======================

Relations between cards are additional families. They are asked for by name (`Cards(..., families=RELATIONS)`) and are
not part of the published benchmark:

=========  ======================================================  ======  ======
family     question                                                answer  tiles
=========  ======================================================  ======  ======
left       what shape is on the card left of the red card?         star    one
above      what shape is on the card above the red card?           star    one
share      which shape do two cards share?                         star    many
odd        which colour is the odd one out?                        red     many
=========  ======================================================  ======  ======

The card left of or above another lies in the neighbouring tile. Two cards share a figure if no other figure occurs
twice; the odd one out is the only card without the figure that all others have.

Everything is a pure function of (seed, split, canvas, index). The splits differ in their random stream and in their
layouts: on a canvas of at least eight tiles, every set of occupied tiles belongs to exactly one split. Boxes serve
evaluation only, never training.

The published benchmark has canvases of 4 x 4 tiles; canvases of other shapes are additional sets of questions.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import datasets
import numpy as np
import torch
from PIL import Image, ImageDraw

from training.data.arguments import DataArguments
from training.data.dataset import VQADataset


COLOURS = {
    "red": (214, 48, 44),
    "orange": (240, 138, 36),
    "yellow": (236, 220, 70),
    "green": (58, 158, 70),
    "cyan": (80, 206, 214),
    "blue": (56, 84, 206),
    "purple": (138, 66, 178),
    "pink": (244, 150, 196),
}
FIGURES = ("circle", "square", "triangle", "diamond", "cross", "star", "heart", "moon")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")

FAMILIES = {  # family -> (number of high-resolution tiles needed, share of the questions)
    "count": ("none", 0.10),
    "presence": ("none", 0.10),
    "refer": ("none", 0.10),
    "open": ("one", 0.25),
    "verify": ("one", 0.125),
    "choice": ("one", 0.125),
    "find": ("many", 0.10),
    "locate": ("many", 0.10),
}
RELATIONS = {"left": "one", "above": "one", "share": "many", "odd": "many"}  # family -> tiles needed
TILES_NEEDED = {family: needed for family, (needed, _) in FAMILIES.items()} | RELATIONS
NEIGHBOURS = {"left": ("left of", 0, -1), "above": ("above", -1, 0)}  # words, and rows and columns to the neighbour
LEAST_CANVAS = {"left": (1, 2, 2), "above": (2, 1, 2), "share": (1, 1, 2), "odd": (1, 1, 3)}  # rows, columns, tiles
SPLITS = ("train", "validation", "test")
LAYOUT_SHARES = {"validation": range(0, 10), "test": range(10, 30), "train": range(30, 100)}  # percentages

TILE = 64
FIGURE_AREA = 150.0  # px of ink, equal for all figures: a thumbnail cannot tell them apart by their darkness
FIGURE_SIZE = 24
MAX_CARDS = 7
CANVAS = (4, 4)  # rows and columns of tiles in the published benchmark

FEATURES = datasets.Features(
    {
        "question_id": datasets.Value("int64"),
        "image": datasets.Image(),
        "question": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "choices": datasets.List(datasets.Value("string")),
        "family": datasets.Value("string"),
        "tiles_needed": datasets.Value("string"),
        "boxes": datasets.List(datasets.List(datasets.Value("float32"))),
    }
)


@dataclass(frozen=True)
class Card:
    """One card: its tile (row and column, from 0), its box in canvas px, its colour and its figure."""

    row: int
    column: int
    box: tuple[int, int, int, int]
    colour: str
    figure: str


@lru_cache
def figure_mask(figure: str) -> np.ndarray:
    """The ink of a figure, `(24, 24)` float32 from 0 to 1, drawn at 8 times its size and scaled to `FIGURE_AREA`."""
    unit = _draw_figure(figure, 512, 160.0)
    scale = np.sqrt(FIGURE_AREA / (np.asarray(unit, np.float32).mean() / 255 * 64**2))
    drawn = _draw_figure(figure, FIGURE_SIZE * 8, 160.0 * scale)
    return np.asarray(drawn.resize((FIGURE_SIZE, FIGURE_SIZE), Image.Resampling.BOX), np.float32) / 255


def _draw_figure(figure: str, size: int, radius: float) -> Image.Image:
    """Draw one figure around the centre of a `size` px canvas, at 8 px per card px."""
    image, centre = Image.new("L", (size, size), 0), size / 2
    draw = ImageDraw.Draw(image)
    radius = radius / 2

    def polygon(angles, radii):
        draw.polygon(
            [(centre + r * radius * np.sin(a), centre - r * radius * np.cos(a)) for a, r in zip(angles, radii)],
            fill=255,
        )

    def disc(x, y, r, fill=255):
        x, y, r = centre + x * radius, centre + y * radius, r * radius
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    turn = 2 * np.pi
    if figure == "circle":
        disc(0, 0, 0.8)
    elif figure == "square":
        polygon([turn * (i + 0.5) / 4 for i in range(4)], [1] * 4)
    elif figure == "triangle":
        polygon([turn * i / 3 for i in range(3)], [1.1] * 3)
    elif figure == "diamond":
        polygon([turn * i / 4 for i in range(4)], [1.1, 0.75] * 2)
    elif figure == "cross":
        for x, y in ((1.0, 0.32), (0.32, 1.0)):
            draw.rectangle(
                (centre - x * radius, centre - y * radius, centre + x * radius, centre + y * radius), fill=255
            )
    elif figure == "star":
        polygon([turn * i / 10 for i in range(10)], [1.2, 0.48] * 5)
    elif figure == "heart":
        disc(-0.42, -0.3, 0.5)
        disc(0.42, -0.3, 0.5)
        polygon([turn * 0.5, turn * 0.81, 0, turn * 0.19], [1.05, 0.93, 0.1, 0.93])
    else:
        disc(0.1, 0, 0.9)
        disc(0.7, 0, 0.7, fill=0)
    return image


def parse_canvas(text: str) -> tuple[int, int]:
    """The rows and columns of a canvas that is written like `2x4`.

    Raises ValueError if `text` is not of this form.
    """
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise ValueError(f"canvas ({text!r}): must be rows x columns in tiles. Write it like 2x4")
    return int(sides[0]), int(sides[1])


def layout_split(tiles: frozenset[int], rows: int, columns: int) -> str:
    """The split that owns a layout, a set of occupied tiles on a canvas of `rows` x `columns` tiles."""
    bucket = zlib.crc32(repr((rows, columns, sorted(tiles))).encode()) % 100
    return next(split for split, share in LAYOUT_SHARES.items() if bucket in share)


def make_scene(rng: np.random.Generator, split: str, rows: int = 4, columns: int = 4) -> tuple[Card, ...]:
    """Two to seven cards of different colours in a layout of `split`; fewer on a canvas with fewer tiles.

    Canvases of fewer than eight tiles have too few layouts to divide between splits.
    """
    highest = min(MAX_CARDS, rows * columns)
    while True:
        count = int(rng.integers(min(2, highest), highest + 1))
        tiles = rng.choice(rows * columns, count, replace=False)
        if rows * columns < 8 or layout_split(frozenset(tiles.tolist()), rows, columns) == split:
            break
    colours = rng.permutation(len(COLOURS))[:count]
    figures = rng.integers(len(FIGURES), size=count)
    names = tuple(COLOURS)
    cards = []
    for tile, colour, figure in zip(tiles, colours, figures):
        row, column = divmod(int(tile), columns)
        width, height = (int(side) for side in rng.integers(36, 49, size=2))
        x = column * TILE + int(rng.integers(3, TILE - width - 2))
        y = row * TILE + int(rng.integers(3, TILE - height - 2))
        cards.append(Card(row, column, (x, y, x + width, y + height), names[colour], FIGURES[figure]))
    return tuple(cards)


def render(rng: np.random.Generator, cards: tuple[Card, ...], rows: int = 4, columns: int = 4) -> np.ndarray:
    """Draw the cards on a cluttered background: `(rows * 64, columns * 64, 3)` uint8."""
    height, width = rows * TILE, columns * TILE
    canvas = np.empty((height, width, 3), np.float32)
    canvas[:] = rng.uniform(90, 190)
    for _ in range(3 * rows * columns):
        h, w = rng.integers(4, 40, size=2)
        y, x = rng.integers(0, height - 4), rng.integers(0, width - 4)
        canvas[y : y + h, x : x + w] = rng.uniform(70, 210) + rng.uniform(-12, 12, size=3)
    for card in cards:
        x0, y0, x1, y1 = card.box
        canvas[y0:y1, x0:x1] = np.array(COLOURS[card.colour]) + rng.uniform(-14, 14, size=3)
        fx = int(rng.integers(x0 + 3, x1 - FIGURE_SIZE - 2))
        fy = int(rng.integers(y0 + 3, y1 - FIGURE_SIZE - 2))
        ink = figure_mask(card.figure)[..., None]
        patch = canvas[fy : fy + FIGURE_SIZE, fx : fx + FIGURE_SIZE]
        patch += ink * (rng.uniform(5, 45) - patch)
    noise = rng.integers(-10, 11, size=(height, width, 1), dtype=np.int8)
    return np.clip(canvas + noise, 0, 255).astype(np.uint8)


def place(card: Card) -> str:
    """The tile of a card in words, with row and column counted from 1."""
    return f"row {card.row + 1} column {card.column + 1}"


def _unique_figures(cards):
    figures = [card.figure for card in cards]
    return [card for card in cards if figures.count(card.figure) == 1]


def make_question(rng: np.random.Generator, family: str, cards, card: Card) -> dict | None:
    """Make a question of `family` about `card`, or return None if the scene does not allow one.

    Returns a dict with `question`, `answer`, `choices` (empty except for multiple choice) and `boxes` (float px).
    Raises ValueError for an unknown family.
    """
    if family in RELATIONS:
        return _make_relation(family, cards, card)
    boxes, choices = [list(map(float, card.box))], []
    if family == "count":
        question, answer = "how many cards are there?", NUMBERS[len(cards)]
        boxes = [list(map(float, each.box)) for each in cards]
    elif family == "presence":
        question, answer = f"is there a {card.colour} card?", "yes"
        if rng.random() < 0.5:
            absent = sorted(set(COLOURS) - {each.colour for each in cards})
            question, answer, boxes = f"is there a {absent[rng.integers(len(absent))]} card?", "no", []
    elif family == "refer":
        question, answer = f"where is the {card.colour} card?", place(card)
    elif family == "open":
        question, answer = f"what shape is on the {card.colour} card?", card.figure
    elif family == "verify":
        figure, answer = card.figure, "yes"
        if rng.random() < 0.5:
            others = sorted({each.figure for each in cards} - {figure})
            if not others or rng.random() < 0.5:
                others = sorted(set(FIGURES) - {figure})
            figure, answer = others[rng.integers(len(others))], "no"
        question = f"does the {card.colour} card show a {figure}?"
    elif family == "choice":
        others = rng.permutation(sorted(set(FIGURES) - {card.figure}))[:3].tolist()
        choices = rng.permutation([card.figure, *others]).tolist()
        question, answer = f"what shape is on the {card.colour} card? choose from {', '.join(choices)}", card.figure
    elif card not in _unique_figures(cards):
        return None
    elif family == "find":
        question, answer = f"which colour is the card with the {card.figure}?", card.colour
    elif family == "locate":
        question, answer = f"where is the card with the {card.figure}?", place(card)
    else:
        raise ValueError(f"family ({family!r}): choose from {', '.join(TILES_NEEDED)}")
    return {"question": question, "answer": answer, "choices": choices, "boxes": boxes}


def _make_relation(family: str, cards, card: Card) -> dict | None:
    """Make a question of one of the `RELATIONS`, or return None if the scene does not allow one."""
    figures = [each.figure for each in cards]
    if family in NEIGHBOURS:
        words, down, right = NEIGHBOURS[family]
        asked = [each for each in cards if (each.row, each.column) == (card.row + down, card.column + right)]
        question = f"what shape is on the card {words} the {card.colour} card?"
    elif family == "share":
        asked = [each for each in cards if figures.count(each.figure) > 1]
        question = "which shape do two cards share?"
        if len(asked) != 2:
            return None
    else:
        asked = _unique_figures(cards) if len(cards) > 2 and len(set(figures)) == 2 else []
        question = "which colour is the odd one out?"
    if not asked:
        return None
    answer = asked[0].colour if family == "odd" else asked[0].figure
    boxes = [list(map(float, each.box)) for each in asked]
    return {"question": question, "answer": answer, "choices": [], "boxes": boxes}


def leave_one_out(rng: np.random.Generator, cards: tuple[Card, ...], odd: Card) -> tuple[Card, ...]:
    """The same cards with one figure on all of them but `odd`, which keeps its own."""
    others = sorted(set(FIGURES) - {odd.figure})
    figure = others[rng.integers(len(others))]
    return tuple(card if card is odd else replace(card, figure=figure) for card in cards)


class Cards(torch.utils.data.Dataset):
    """The cards benchmark as a map-style data set that generates every sample from its index.

    Args:
        split: `"train"`, `"validation"` or `"test"`.
        size: number of samples.
        seed: seed of the benchmark; 0 is the published one.
        canvases: canvases as `(rows, columns)` in tiles, 1 to 4 each, that the samples have in turn; the published
            benchmark has 4 x 4 only. A sample depends on its own canvas, not on the others. Canvases of fewer than
            eight tiles have the same layouts in all splits. The processor of the stand-in keeps the size of a canvas
            whose longer side has 4 tiles, and enlarges the others to that length.
        families: families to ask in equal shares, from `FAMILIES` and `RELATIONS`; by default the published ones in
            their shares.

    Each item is a dict with `question_id` (int), `image` (PIL, RGB), `question`, `answer`, `choices`, `family`,
    `tiles_needed` and `boxes` (`[x0, y0, x1, y1]` in px, for evaluation only).

    Raises ValueError for an unknown split or family, a wrong canvas, one too small for a family, no canvas or no
    family; IndexError for an index out of range.
    """

    def __init__(
        self,
        split: str,
        size: int,
        seed: int = 0,
        canvases: Sequence[tuple[int, int]] = (CANVAS,),
        families: Sequence[str] | None = None,
    ):
        if split not in SPLITS:
            raise ValueError(f"split ({split!r}): choose from {', '.join(SPLITS)}")
        if not canvases:
            raise ValueError("canvases (0): at least one is needed. Leave them out for 4 x 4 tiles")
        for rows, columns in canvases:
            if not (1 <= rows <= 4 and 1 <= columns <= 4):
                raise ValueError(f"canvas ({rows} x {columns} tiles): each side must have 1 to 4 tiles")
        if families is not None and not families:
            raise ValueError("families (0): at least one is needed. Leave them out for the published ones")
        for family in families or ():
            if family not in TILES_NEEDED:
                raise ValueError(f"family ({family!r}): choose from {', '.join(TILES_NEEDED)}")
            least_rows, least_columns, least_tiles = LEAST_CANVAS.get(family, (1, 1, 1))
            for rows, columns in canvases:
                if rows < least_rows or columns < least_columns or rows * columns < least_tiles:
                    raise ValueError(
                        f"family ({family!r}): a canvas of {rows} x {columns} tiles is too small for it. It needs "
                        f"{least_rows} rows, {least_columns} columns and {least_tiles} tiles"
                    )
        self.split, self.size, self.seed = split, size, seed
        self.canvases = tuple(canvases)
        self.families = None if families is None else tuple(families)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.size:
            raise IndexError(f"index ({index}) is out of range for {self.size} samples")
        rows, columns = self.canvases[index % len(self.canvases)]
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), rows, columns, index))
        if self.families is None:
            family, cards, turn = self._ask_published(rng, rows, columns)
        else:
            family = self.families[rng.integers(len(self.families))]
            cards, turn = self._ask(rng, family, rows, columns)
        image = Image.fromarray(render(rng, cards, rows, columns))
        needed = TILES_NEEDED[family]
        return {"question_id": index, "image": image, **turn, "family": family, "tiles_needed": needed}

    def _ask_published(self, rng, rows, columns):
        """The family is drawn anew for every scene: those that not every scene allows are rarer than their share."""
        families, shares = list(FAMILIES), [share for _, share in FAMILIES.values()]
        turn = None
        while turn is None:
            cards = make_scene(rng, self.split, rows, columns)
            number = rng.permutation(len(cards))[0]
            family = families[rng.choice(len(families), p=shares)]
            turn = make_question(rng, family, cards, cards[number])
        return family, cards, turn

    def _ask(self, rng, family, rows, columns):
        turn = None
        while turn is None:
            cards = make_scene(rng, self.split, rows, columns)
            card = cards[rng.integers(len(cards))]
            cards = leave_one_out(rng, cards, card) if family == "odd" else cards
            turn = make_question(rng, family, cards, card)
        return cards, turn


def load_cards(split: str = "test", size: int = 2000, seed: int = 0) -> datasets.Dataset:
    """The benchmark as a `datasets.Dataset` with `FEATURES`, generated once and kept in the `datasets` cache."""

    def generate(split, size, seed):
        yield from (dict(sample) for sample in Cards(split, size, seed))

    return datasets.Dataset.from_generator(
        generate, features=FEATURES, gen_kwargs={"split": split, "size": size, "seed": seed}
    )


def _load(arguments: DataArguments, split: str, seed: int) -> Cards:
    """Training cards depend on the seed and the canvases of the run; all others are the published ones."""
    if split != "train":
        return Cards(split, arguments.test_size)
    canvases = [CANVAS] if arguments.train_canvases is None else map(parse_canvas, arguments.train_canvases)
    return Cards(split, arguments.train_size, seed, tuple(canvases))


def _grade(prediction: str, sample: dict) -> float:
    """1 if the prediction equals the answer, ignoring case and surrounding whitespace."""
    return float(prediction.strip().lower() == sample["answer"].strip().lower())


CARDS = VQADataset(
    name="cards",
    hub_id=None,
    eval_split="test",
    eval_size=2000,
    load=_load,
    grade=_grade,
    graded_by="exact match",
)
