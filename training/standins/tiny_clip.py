"""Train the tiny CLIP that stands in for a real one on cards, if weights cannot be downloaded.

    python training/standins/tiny_clip.py --output_dir hub_cards/tiny-clip

Captions name cards by colour and figure, never by position. The images are canvases of the training split at 64 px:
whole, as in `PatchWordAlignment`, or windows of them. The folder has open_clip's format, tokenizer included.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from tqdm import tqdm, trange
from transformers import PreTrainedTokenizerFast

from training.cli.arguments import errors_in_one_line, parse
from training.data.cards import TILE, Card, Cards, make_scene, render
from training.learning.clip_alignment import NEUTRAL, WORD, PatchWordAlignment, clip_pixels
from training.standins.tiny import build_tokenizer


def build_clip_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny model's tokenizer, right-padded, with an end-of-text token for CLIP to pool at."""
    tokenizer = build_tokenizer()
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokenizer.padding_side = "right"
    return tokenizer


def build_config(tokenizer: PreTrainedTokenizerFast) -> dict:
    """Contents of `open_clip_config.json`: 8 x 8 patches of 8 px, and a text tower of two layers."""
    return {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16},
            "text_cfg": {
                "context_length": 24,
                "vocab_size": len(tokenizer),
                "hf_tokenizer_name": "tokenizer.json",  # any name: open_clip takes the one in this folder
                "width": 64,
                "heads": 4,
                "layers": 2,
                "pool_type": "eos",
                "eos_id": tokenizer.eos_token_id,
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
    }


def name_card(rng: np.random.Generator, card: Card) -> str:
    """One of the ways to name a card."""
    ways = (
        card.colour,
        f"a {card.colour} card",
        f"a {card.colour} card with a {card.figure}",
        f"a card with a {card.figure}",
        f"a {card.figure}",
    )
    return ways[rng.choice(len(ways), p=(0.3, 0.3, 0.2, 0.1, 0.1))]


def caption(rng: np.random.Generator, cards: tuple[Card, ...]) -> str:
    """Name all cards in view, in random order."""
    order = rng.permutation(len(cards))
    return WORD.format(" and ".join(name_card(rng, cards[number]) for number in order)) if cards else NEUTRAL


def make_view(rng: np.random.Generator) -> tuple[Image.Image, tuple[Card, ...]]:
    """A square window of a training canvas, and the cards in it.

    Half of the windows are 2 x 2 tiles around a card: whole canvases have so many cards that a caption says little
    about any single one. The others are whole canvases, the scale at which CLIP is used.
    """
    cards = make_scene(rng, "train")
    image = Image.fromarray(render(rng, cards))
    if rng.random() < 0.5:
        return image, cards
    about = cards[rng.integers(len(cards))]
    top, left = (int(np.clip(place - rng.integers(2), 0, 2)) for place in (about.row, about.column))
    shown = tuple(card for card in cards if card.row - top in (0, 1) and card.column - left in (0, 1))
    return image.crop((left * TILE, top * TILE, (left + 2) * TILE, (top + 2) * TILE)), shown


def train(clip, tokenizer, images: int, steps: int, batch_size: int, learning_rate: float, seed: int):
    """Train on `images` views of the training split, with a new caption every time."""
    rng = np.random.default_rng((seed, 0xC11B))
    scenes, pixels = [], torch.empty(images, 3, 64, 64)
    for number in trange(images, desc="views"):
        image, cards = make_view(rng)
        scenes.append(cards)
        pixels[number] = clip_pixels(clip, [image])[0]
    optimizer = torch.optim.AdamW(clip.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    loss_function = open_clip.ClipLoss()
    bar = trange(steps, desc="training")
    for _ in bar:
        chosen = rng.choice(images, batch_size, replace=False)
        texts = tokenizer([caption(rng, scenes[number]) for number in chosen])
        image_features, text_features, scale = clip(pixels[chosen], texts)[:3]
        loss = loss_function(image_features, text_features, scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))
        bar.set_postfix(loss=f"{loss.item():.2f}")


def pointing(alignment: PatchWordAlignment, questions: int, split: str = "validation") -> float:
    """Share of `open` and `refer` questions whose most similar cell lies on the card in question.

    The centre of the cell must lie within the card's box; with 4 x 4 cells, chance is 1 / 16.
    """
    asked = (sample for sample in Cards(split, 100 * questions) if sample["family"] in ("open", "refer"))
    hits = 0
    for _ in trange(questions, desc="pointing"):
        sample = next(asked)
        row, column = divmod(int(alignment.similarity([sample]).argmax()), alignment.side)
        x0, y0, x1, y1 = (edge / 256 * alignment.side for edge in sample["boxes"][0])
        hits += x0 <= column + 0.5 <= x1 and y0 <= row + 0.5 <= y1
    return hits / questions


@dataclass
class TinyClipArguments:
    """How the CLIP is trained."""

    output_dir: str = field(metadata={"help": "Folder for the CLIP."})
    images: int = field(default=8000, metadata={"help": "Number of canvases."})
    steps: int = field(default=600, metadata={"help": "Number of batches."})
    batch_size: int = field(default=128, metadata={"help": "Canvases per batch."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, canvases and captions."})


def build(args: TinyClipArguments):
    """Train a CLIP, write its folder, and print how often it points at the card in question."""
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = build_clip_tokenizer()
    tokenizer.save_pretrained(output)
    config = build_config(tokenizer)
    (output / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    name = f"local-dir:{output}"
    torch.manual_seed(args.seed)
    clip = open_clip.create_model(name, load_weights=False)
    train(clip, open_clip.get_tokenizer(name), args.images, args.steps, args.batch_size, args.learning_rate, args.seed)
    save_file(clip.state_dict(), output / "open_clip_model.safetensors")

    share = pointing(PatchWordAlignment(name, None, side=4), questions=300)
    tqdm.write(f"pointing on validation: {share:.3f} of 300 questions (chance 0.0625)")


def main():
    with errors_in_one_line():
        build(parse(TinyClipArguments, __doc__))


if __name__ == "__main__":
    main()
