"""Patch-word alignment: similarity of image cells and question words according to a frozen CLIP.

CLIP aligns its pooled vector with text, not its patches. Without the last attention, which pools the patches, they can
be compared with words too: the *value path* of MaskCLIP (Zhou, Loy and Dai, "Extract Free Dense Labels from CLIP",
2022). CLIP is used in training only, and it is never trained.
"""

import hashlib
import os
import re

import numpy as np
import open_clip
import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from PIL import Image
from torch.nn.functional import interpolate, linear, normalize

from training.learning.store import digest


WORD = "a photo of {}."
NEUTRAL = "a photo."
FLAT = 1e-3  # standard deviation of cosines over an image; smaller differences count as noise

# Words for nothing visible: grammar, question words, types of answers, instructions.
STOP_WORDS = frozenset(
    """
    a an the this that these those some any all each every both no not and or but if of in on at to from by for with
    without as than into onto over under between there here it its he she they them their his her him you your i we our
    is are was were be been being am do does did doing have has had can could will would shall should may might must
    what which who whom whose where when why how many much more most few less other one
    colour colours color colors shape shapes kind kinds type types sort number name amount
    show shows shown see seen look looks looking located visible present evidence find choose select pick answer
    describe tell give say image picture photo
    """.split()
)


# The model


def load_clip(name: str, pretrained: str | None, device: str = "cpu"):
    """Load a CLIP of open_clip, frozen and in evaluation mode, and its tokenizer: `(clip, tokenizer)`.

    Args:
        name: a model of open_clip (`"ViT-B-16"`), `"hf-hub:OWNER/NAME"`, or `"local-dir:PATH"` for a folder in
            open_clip's format: `open_clip_config.json`, weights, and the tokenizer files if the configuration has an
            `hf_tokenizer_name`.
        pretrained: open_clip's tag of the weights (`"openai"`), or a file of weights; None for the other two.

    Raises ValueError if the name or tag is unknown or, before any weights are downloaded, if the patches of the vision
    tower cannot be compared with words; FileNotFoundError if a local folder has no configuration; RuntimeError if it
    has no weights.
    """
    config = open_clip.get_model_config(name)
    see = "open_clip.list_pretrained() lists all models with their tags"
    if config is None:
        raise ValueError(f"clip_model ({name!r}): unknown to open_clip. {see}")
    if ":" not in name and not open_clip.is_pretrained_cfg(name, pretrained or "") and not _is_file(pretrained):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(f"clip_pretrained ({pretrained!r}): {name} has the tags {tags}. {see}")
    vision = config["vision_cfg"] | (
        {"timm_model_pretrained": False} if "timm_model_name" in config["vision_cfg"] else {}
    )
    with torch.device("meta"):
        check_tower(name, open_clip.CLIP(config["embed_dim"], vision, {}).visual)
    clip = open_clip.create_model(name, pretrained, device=device, require_pretrained=True)
    return clip.eval().requires_grad_(False), open_clip.get_tokenizer(name)


def _is_file(pretrained: str | None) -> bool:
    return pretrained is not None and os.path.isfile(pretrained)


def check_tower(name: str, visual: torch.nn.Module):
    """Raise ValueError, naming class and grid, if the patches of a vision tower cannot be compared with words."""
    grid = getattr(visual, "grid_size", None)
    needed = "patch-word alignment needs open_clip's VisionTransformer with a square patch grid"
    if not isinstance(visual, VisionTransformer) or grid[0] != grid[1]:
        shape = f"a grid of {grid[0]} x {grid[1]} patches" if isinstance(grid, tuple) else "no grid of patches"
        raise ValueError(f"the vision tower of {name} is a {type(visual).__name__} with {shape}: {needed}")
    block = visual.transformer.resblocks[-1]
    if visual.attn_pool is not None or not isinstance(block, ResidualAttentionBlock):
        raise ValueError(
            f"the vision tower of {name} is a VisionTransformer with a grid of {grid[0]} x {grid[1]} patches, but "
            f"ends in {type(visual.attn_pool or block).__name__}, after which patches have no position: {needed}"
        )


def patch_features(clip: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Patch features in CLIP's joint space by the value path, `(B, g * g, E)`, unit length, in row-major order.

    In the last residual block, the projected value of each patch replaces the attention. The residual around the
    attention is dropped, as in ClearCLIP (Lan et al., 2024); the MLP and its residual are kept, as in MaskCLIP. With
    the tiny CLIP, this variant points best on validation cards; no real CLIP has been measured.

    Args:
        clip: a CLIP of open_clip in evaluation mode (see `load_clip`); it is not modified.
        pixels: `(B, 3, S, S)`, normalised, see `clip_pixels`.
    """
    visual = clip.visual
    inner = visual.forward_intermediates(
        pixels, indices=[-2], stop_early=True, intermediates_only=True, output_fmt="NLC"
    )
    x = inner["image_intermediates"][0]  # before the last block, without the class token
    block = visual.transformer.resblocks[-1]
    attention, width = block.attn, x.shape[-1]
    value = linear(block.ln_1(x), attention.in_proj_weight[-width:], attention.in_proj_bias[-width:])
    x = block.ls_1(attention.out_proj(value))
    x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return normalize(visual.ln_post(x) @ visual.proj, dim=-1)


def clip_pixels(clip: torch.nn.Module, images: list[Image.Image]) -> torch.Tensor:
    """Images as inputs of CLIP, `(B, 3, S, S)` float32 on the CPU, normalised by its mean and standard deviation.

    Images are squashed to a square instead of cropped, since the glance shows the whole image too.
    """
    height, width = clip.visual.image_size
    squashed = [image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC) for image in images]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in squashed])).permute(0, 3, 1, 2) / 255
    config = clip.visual.preprocess_cfg
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (pixels - mean) / std


# Words and cells


def content_words(question: str) -> list[str]:
    """The words of a question that may name something in the image: lower case, without repetition, in order.

    Only the first line counts, up to the first question mark; choices and instructions follow after it. Words consist
    of letters and digits, without a final `'s` or `n't`; `STOP_WORDS` are left out.
    """
    line = question.strip().partition("\n")[0].partition("?")[0].lower()
    words = re.findall(r"[^\W_]+", re.sub(r"n['’]t\b|['’]\w+", "", line))
    return list(dict.fromkeys(word for word in words if word not in STOP_WORDS))


def to_cells(maps: torch.Tensor, side: int) -> torch.Tensor:
    """Resize patch maps `(W, g * g)` to `(W, side * side)`: area means, or bilinear if the grid is smaller."""
    grid = round(maps.shape[-1] ** 0.5)
    maps = maps.view(1, -1, grid, grid)
    if grid >= side:
        maps = interpolate(maps, size=(side, side), mode="area")
    else:
        maps = interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
    return maps.flatten(2)[0]


def image_key(image: Image.Image) -> str:
    """SHA-256 of the size and the RGB bytes of an image."""
    image = image.convert("RGB")
    return hashlib.sha256(f"{image.width}x{image.height} ".encode() + image.tobytes()).hexdigest()


class PatchWordAlignment:
    """Similarity of the cells of an image and the content words of a question, according to a frozen CLIP.

    Args:
        name, pretrained: see `load_clip`.
        side: number of cells per side of the glance: 8 for SmolVLM, 4 for the tiny model.
        store: cache of the patch features per image: an object with `get(key) -> Tensor | None` and
            `put(key, tensor)`, such as `training.learning.store.TensorStore`; None recomputes them every time.
        device: device of the CLIP.

    Raises ValueError as `load_clip` does.
    """

    def __init__(self, name: str, pretrained: str | None, side: int, store=None, device: str = "cpu"):
        self.clip, self.tokenizer = load_clip(name, pretrained, device)
        self.name, self.pretrained, self.side, self.store, self.device = name, pretrained, side, store, device
        self.word_features: dict[str, torch.Tensor] = {}

    def fingerprint(self) -> dict[str, str]:
        """Everything that the patch features depend on: the `maker` of a `TensorStore`."""
        weights = digest(*self.clip.state_dict().values())
        return {"clip": self.name, "clip_pretrained": str(self.pretrained), "clip_weights": weights}

    def similarity(self, samples: list[dict]) -> torch.Tensor:
        """Similarity of cells and words, `(B, side * side)` float32 on the CPU, in row-major order of the glance.

        For each content word, its cosine with each patch minus that of a neutral text is averaged over each cell, then
        standardised over the image. A cell gets the maximum over the words, so that words that match nowhere do no
        harm. Without content words, or if all cells are equally similar, the row is zero.

        Args:
            samples: dicts with `image` (PIL) and `question`.
        """
        rows = torch.zeros(len(samples), self.side**2)
        patches = self.features([sample["image"] for sample in samples]).float()
        for row, patch, sample in zip(rows, patches, samples):
            words = content_words(sample["question"])
            if words:
                maps = to_cells(self.words(words) @ patch.T, self.side)
                maps = maps - maps.mean(1, keepdim=True)
                row.copy_((maps / maps.std(1, unbiased=False, keepdim=True).clamp(min=FLAT)).amax(0))
        return rows

    @torch.no_grad()
    def words(self, words: list[str]) -> torch.Tensor:
        """Features of words minus those of the neutral text, `(W, E)` float32 on the CPU."""
        new = [word for word in words if word not in self.word_features]
        if new:
            tokens = self.tokenizer([NEUTRAL, *map(WORD.format, new)]).to(self.device)
            neutral, *found = self.clip.encode_text(tokens, normalize=True).float().cpu()
            self.word_features |= {word: feature - neutral for word, feature in zip(new, found)}
        return torch.stack([self.word_features[word] for word in words])

    @torch.no_grad()
    def features(self, images: list[Image.Image]) -> torch.Tensor:
        """Patch features of images, `(B, g * g, E)` float16 on the CPU, from the store if it has them."""
        keys = [image_key(image) for image in images]
        found = {key: self.store.get(key) if self.store is not None else None for key in keys}
        missing = {key: image for key, image in zip(keys, images) if found[key] is None}
        if missing:
            pixels = clip_pixels(self.clip, list(missing.values())).to(self.device)
            found |= dict(zip(missing, patch_features(self.clip, pixels).half().cpu()))
        if self.store is not None:
            for key in missing:
                self.store.put(key, found[key])
        return torch.stack([found[key] for key in keys])
