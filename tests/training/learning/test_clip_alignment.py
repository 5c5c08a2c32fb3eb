"""Patch-word alignment: the value path, its store, words, errors, the loss, and where the shipped CLIP points."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from training.learning.clip_alignment import (
    PatchWordAlignment,
    check_tower,
    clip_pixels,
    content_words,
    image_key,
    load_clip,
    patch_features,
    to_cells,
)
from training.learning.losses import patch_word_loss
from training.standins.tiny_clip import pointing


SHIPPED = Path(__file__).parents[3] / "hub_cards" / "tiny-clip"
NAME = f"local-dir:{SHIPPED}"
TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
shipped = pytest.mark.skipif(
    not SHIPPED.exists(), reason="hub_cards/tiny-clip is not there: run training/standins/tiny_clip.py"
)


class Memory(dict):
    """A store that counts what it is given."""

    puts = 0

    def put(self, key, tensor):
        self.puts += 1
        self[key] = tensor


def make_clip(**vision):
    """A random CLIP of 3 layers, 4 x 4 patches."""
    vision = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 3, "head_width": 8} | vision
    clip = open_clip.CLIP(12, vision, TEXT)
    with torch.no_grad():
        for weight in clip.visual.parameters():  # biases too: zeros would hide a missing one
            weight.normal_(std=0.3)
    return clip.eval()


@pytest.fixture(scope="module")
def alignment():
    return PatchWordAlignment(NAME, None, side=4)


# The value path


@pytest.mark.parametrize("vision", [{}, {"ls_init_value": 0.5}, {"no_ln_pre": True}, {"patch_dropout": 0.5}])
@torch.no_grad()
def test_value_path_by_hand(vision):
    """Attention that lets each patch see only itself gives its projected value: the mask does what the path does."""
    clip, pixels = make_clip(**vision), torch.randn(2, 3, 32, 32)
    visual = clip.visual
    patches = visual.conv1(pixels).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(2, 1, -1), patches], 1) + visual.positional_embedding
    x = visual.ln_pre(x)
    *inner, last = visual.transformer.resblocks
    for block in inner:
        x = block(x)
    alone = torch.zeros(17, 17).masked_fill(~torch.eye(17, dtype=torch.bool), float("-inf"))
    x = last.ls_1(last.attention(last.ln_1(x), attn_mask=alone))
    x = (x + last.ls_2(last.mlp(last.ln_2(x))))[:, 1:]
    x = visual.ln_post(x) @ visual.proj
    torch.testing.assert_close(patch_features(clip, pixels), x / x.norm(dim=-1, keepdim=True), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_patch_features_leave_the_model_as_it_is():
    clip, pixels = make_clip(), torch.randn(2, 3, 32, 32)
    before, weights = clip.encode_image(pixels), {name: value.clone() for name, value in clip.state_dict().items()}
    features = patch_features(clip, pixels)
    assert features.shape == (2, 16, 12)
    assert torch.equal(clip.encode_image(pixels), before)
    assert all(torch.equal(value, weights[name]) for name, value in clip.state_dict().items())


def test_images_are_squashed_not_cropped():
    clip = make_clip()
    open_clip.set_model_preprocess_cfg(clip, {"mean": [0.5] * 3, "std": [0.25] * 3})
    wide = np.zeros((32, 128, 3), np.uint8)
    wide[:, :24] = wide[:, -24:] = 255  # a crop of the centre would lose both ends
    pixels = clip_pixels(clip, [Image.fromarray(wide)])
    assert pixels.shape == (1, 3, 32, 32)
    torch.testing.assert_close(pixels[..., 0], torch.full((1, 3, 32), 2.0))
    torch.testing.assert_close(pixels[..., -1], torch.full((1, 3, 32), 2.0))
    torch.testing.assert_close(pixels[..., 16], torch.full((1, 3, 32), -2.0))


def test_cells_of_patches():
    maps = torch.arange(16.0).view(1, 16)
    assert to_cells(maps, 2).tolist() == [[2.5, 4.5, 10.5, 12.5]]
    assert to_cells(maps, 4).tolist() == maps.tolist()
    assert to_cells(maps, 8).shape == (1, 64)


# Errors


def test_unknown_name():
    with pytest.raises(ValueError, match=r"'ViT-Z-99'.*list_pretrained"):
        load_clip("ViT-Z-99", "openai")


@pytest.mark.parametrize("tag", ["no_such_tag", None])
def test_unknown_tag(tag):
    with pytest.raises(ValueError, match=rf"{tag}.*ViT-B-32 has the tags openai, .*list_pretrained"):
        load_clip("ViT-B-32", tag)


def test_towers_without_patches_are_refused_before_anything_is_fetched():
    with pytest.raises(ValueError, match="RN50 is a ModifiedResNet with no grid"):
        load_clip("RN50", "openai")
    with pytest.raises(ValueError, match="ViT-B-16-SigLIP is a TimmModel with no grid"):
        load_clip("ViT-B-16-SigLIP", "webli")


def test_towers_with_other_patches_are_refused():
    with pytest.raises(ValueError, match="VisionTransformer with a grid of 4 x 8 patches"):
        check_tower("wide", make_clip(image_size=(32, 64)).visual)
    with pytest.raises(ValueError, match="grid of 4 x 4 patches, but ends in AttentionalPooler"):
        check_tower("pooled", make_clip(attentional_pool=True, attn_pooler_heads=2).visual)
    with pytest.raises(ValueError, match="ends in CustomResidualAttentionBlock"):
        check_tower("custom", make_clip(qk_norm=True).visual)


def test_folder_without_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match="open_clip_config.json"):
        load_clip(f"local-dir:{tmp_path}", None)


# Words


@pytest.mark.parametrize(
    "question, words",
    [
        ("what shape is on the red card?", ["red", "card"]),
        ("what shape is on the red card? choose from star, moon, heart", ["red", "card"]),
        ("Is the heart's border visible?\nGive a very brief answer.", ["heart", "border"]),
        ('Where is "the Dog, left of a dog_2"? Give its bounding box.', ["dog", "left", "2"]),
        ("Isn't it?", []),
        ("", []),
    ],
)
def test_content_words(question, words):
    assert content_words(question) == words


# The class


@shipped
def test_store_is_asked_and_filled_once(alignment, make_image, monkeypatch):
    store = Memory()
    monkeypatch.setattr(alignment, "store", store)
    samples = [{"image": make_image(seed), "question": "where is the red card?"} for seed in (0, 1, 0)]
    first = alignment.similarity(samples)
    assert store.puts == 2 and set(store) == {image_key(samples[0]["image"]), image_key(samples[1]["image"])}
    monkeypatch.setattr("training.learning.clip_alignment.patch_features", None)  # not called again
    assert torch.equal(alignment.similarity(samples), first) and store.puts == 2
    assert torch.equal(first[0], first[2])


@shipped
def test_image_key_knows_the_size():
    assert image_key(Image.new("RGB", (2, 8))) != image_key(Image.new("RGB", (4, 4)))
    assert image_key(Image.new("L", (4, 4))) == image_key(Image.new("RGB", (4, 4)))


@shipped
def test_similarity(alignment, make_image):
    questions = ["where is the red card?", "what is it?", "where is the blue card?"]
    samples = [{"image": make_image(number), "question": question} for number, question in enumerate(questions)]
    similarity = alignment.similarity(samples)
    assert similarity.shape == (3, 16) and similarity.dtype == torch.float32 and not similarity.requires_grad
    assert not similarity[1].any() and similarity[0].std() > 0.1
    singles = torch.cat([alignment.similarity([sample]) for sample in samples])
    torch.testing.assert_close(similarity, singles, rtol=0, atol=0.05)  # features are kept in half precision


@shipped
def test_fingerprint_names_the_clip(alignment):
    found = alignment.fingerprint()
    assert found["clip"] == NAME and found["clip_pretrained"] == "None" and len(found["clip_weights"]) == 32
    assert found == PatchWordAlignment(NAME, None, side=8).fingerprint()


@shipped
def test_shipped_clip_is_small_and_points_above_chance(alignment):
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 5e6
    assert pointing(alignment, questions=100) > 0.4  # chance is 1 / 16


# The loss


def test_patch_word_loss_by_hand():
    # Similarities 0 and log 2 at temperature 1/2 are a teacher of 1/5 and 4/5; a row without spread is ignored.
    relevance = torch.tensor([[0.25, 0.75], [0.01, 0.99]]).log()
    similarity = torch.tensor([[1.0, 2.0], [1.0, 1.0]]).log()
    expected = -(0.2 * np.log(0.25) + 0.8 * np.log(0.75))
    assert patch_word_loss(relevance, similarity, temperature=0.5).item() == pytest.approx(expected, rel=1e-6)


def test_patch_word_loss_gradient_by_finite_differences():
    scores = torch.randn(3, 5, dtype=torch.double, requires_grad=True)
    similarity = torch.randn(3, 5, dtype=torch.double)
    similarity[1] = 0
    assert torch.autograd.gradcheck(lambda x: patch_word_loss(x.log_softmax(1), similarity, 0.5), scores)


def test_patch_word_loss_without_any_spread():
    relevance = torch.randn(2, 4).log_softmax(1).requires_grad_()
    loss = patch_word_loss(relevance, torch.zeros(2, 4), 0.5)
    loss.backward()
    assert loss.item() == 0 and not relevance.grad.any()
