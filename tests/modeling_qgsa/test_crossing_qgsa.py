"""Blocks in front of cross layers (VISOR's own form): against a plain pass without cache, padding or shared work."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import pad
from transformers import DynamicCache
from turns import check_turns_of_text

from modeling_qgsa import QGSAConfig, QGSASmolVLMForConditionalGeneration
from modeling_qgsa.compat_qgsa import CACHE
from modeling_qgsa.crossing_qgsa import VisionBlock, convolve, places_apart
from modeling_qgsa.interaction_qgsa import Interaction, read_layers
from modeling_qgsa.schedule_qgsa import cross_share, vision_share
from training.methods.method import encode_all


WHOLE = {"selection": "after_encoder", "min_visual_tokens": 9999, "max_visual_tokens": 9999}
SHORTLIST = ["CTTT", "CCTC", "FCFC", "FFFF"]
DEPTHS = {  # of three samples
    "CTTT FCFC CCTC": torch.tensor([0.0, 0.67, 0.34]),
    "FCFC CCTC FCFC": torch.tensor([0.67, 0.34, 0.67]),  # the first and the last are read together
}
TILE = 16  # visual tokens


@torch.no_grad()
def open_gates(model, seed=5):
    """Weights of all blocks as if trained, with much effect."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.model.vision_blocks:
        for weight in block.parameters():
            weight.normal_(std=0.4, generator=generator)
        block.text_norm.weight.add_(1)
        block.visual_norm.weight.add_(1)
        block.gate.div_(block.gate_scale).add_(0.2)
    return model


@pytest.fixture(scope="module")
def deep(make_deep):
    return open_gates(make_deep(vision_cross="block"))


@pytest.fixture(scope="module")
def mixed(make_deep):
    return open_gates(make_deep(vision_cross="block", vision_schedules=SHORTLIST, vision_policy=True))


def chosen(complexity):
    return SHORTLIST[round(complexity * (len(SHORTLIST) - 1))]


def plain_block(block, text, visual, earlier):
    """What a block adds, word by word: `text` (L, D), `visual` (n, D), whole tiles, and `earlier`, n of every word."""
    states = block.key_value(block.visual_norm(visual))
    tiles = [block.conv(tile.T[None])[0].T for tile in states.split(TILE)]
    keys, values = (states + torch.cat(tiles)).unflatten(-1, (2, block.heads, -1)).unbind(1)
    queries = block.query(block.text_norm(text)).unflatten(-1, (block.heads, -1))
    rows = []
    for row, count in enumerate(earlier):
        if not count:
            rows.append(torch.zeros_like(text[0]))
            continue
        weights = (torch.einsum("hd,nhd->hn", queries[row], keys[:count]) * block.scaling).softmax(-1)
        rows.append(block.output(torch.einsum("hn,nhd->hd", weights, values[:count]).flatten()))
    return torch.stack(rows) * (block.gate * block.gate_scale).tanh()


@torch.no_grad()
def plain_pass(model, inputs, schedule, new_tokens):
    """Greedy ids for one sample, by passes over the whole prompt."""
    ids, text_model = inputs["input_ids"], copy.deepcopy(model.model.text_model)
    text_model.set_attn_implementation("eager")
    embeds, visual = model.get_input_embeddings()(ids), ids[0] == model.config.image_token_id
    embeds[0, visual] = encode_all(model, inputs).flatten(0, 1)
    made = []
    for _ in range(new_tokens):
        length = embeds.shape[1]
        positions, is_visual = torch.arange(length)[None], pad(visual, (0, length - len(visual)))
        rotary, hidden = text_model.rotary_emb(embeds, positions), embeds
        causal = torch.full((length, length), float("-inf")).triu(1)
        hiding = causal.masked_fill(is_visual[None] & ~is_visual[:, None], float("-inf"))
        for number, (kind, layer) in enumerate(zip(schedule, text_model.layers)):
            if kind == "C":
                text, earlier = hidden[0, ~is_visual], is_visual.cumsum(0)[~is_visual].tolist()
                added = plain_block(model.model.vision_blocks[number], text, hidden[0, is_visual], earlier)
                hidden = hidden.index_put((torch.zeros(1).long(), (~is_visual).nonzero()[:, 0]), text + added)
            mask = (causal if kind == "F" else hiding)[None, None]
            updated = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            hidden = updated if kind == "F" else torch.where(is_visual[None, :, None], hidden, updated)
        made.append(int(model.lm_head(text_model.norm(hidden[:, -1:])).argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([made[-1:]]))], 1)
    return made


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("schedule", ["FFCC", "CCCC", "CFTC", "TCFF"])
def test_a_schedule_equals_a_plain_pass(deep, batch, samples, prepare, schedule, attention):
    model = copy.deepcopy(deep)
    model.set_attn_implementation(attention)
    ids = model.generate(**batch, **WHOLE, vision_budget=schedule, max_new_tokens=5)
    for row, sample in enumerate(samples):
        assert ids[row, -5:].tolist() == plain_pass(deep, prepare(sample), schedule, 5)


def test_several_images_and_words_before_them(deep, prepare, make_image):
    inputs = prepare(("what is it?", [make_image(0, 128, 64), make_image(1, 64, 128)]))
    ids = deep.generate(**inputs, **WHOLE, vision_budget="CFCC", max_new_tokens=5)
    assert ids[0, -5:].tolist() == plain_pass(deep, inputs, "CFCC", 5)


def test_a_closed_gate_leaves_the_text_alone(make_deep, deep, batch):
    fresh, shown = make_deep(vision_cross="block"), batch["attention_mask"].bool()
    with torch.no_grad():
        text = fresh(**batch, **WHOLE, vision_budget="FTTF").logits[shown]
        for model, same in ((fresh, True), (deep, False)):
            logits = model(**batch, **WHOLE, vision_budget="FCCF").logits[shown]
            assert torch.equal(logits, text) == same


def test_blocks_are_new_weights_only_if_asked_for(make_deep, deep):
    plain = make_deep()
    names = set(deep.state_dict()) - set(plain.state_dict())
    assert plain.model.vision_blocks is None and len(deep.model.vision_blocks) == 4
    assert names == {name for name in deep.state_dict() if name.startswith("model.vision_blocks.")}
    own = {name: weight for name, weight in deep.state_dict().items() if "text_model" in name or "lm_head" in name}
    assert all(torch.equal(weight, plain.state_dict()[name]) for name, weight in own.items())


def test_dense_and_full_layers_run_no_block(make_deep, deep, single):
    with torch.no_grad():
        for options in (
            {"selection": "dense"},
            {**WHOLE, "vision_budget": "FFFF"},
            {**WHOLE, "vision_budget": "FTFT"},
        ):
            assert torch.equal(deep(**single, **options).logits, make_deep()(**single, **options).logits)


# The cache


@pytest.mark.parametrize("schedule", ["FCTC", "CCCC"])
def test_cached_equals_uncached(deep, batch, schedule):
    options = {**WHOLE, "vision_budget": schedule}
    ids, length = deep.generate(**batch, **options, max_new_tokens=4), batch["input_ids"].shape[1]
    for step in range(4):
        new = ids[:, length : length + step]
        grown = {
            "input_ids": torch.cat([batch["input_ids"], new], 1),
            "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(new)], 1),
            "question_mask": torch.cat([batch["question_mask"], torch.zeros_like(new)], 1),
        }
        with torch.no_grad():
            logits = deep(**batch | grown, **options, use_cache=False).logits
        assert torch.equal(logits[:, -1].argmax(-1), ids[:, length + step])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_batch_equals_single(deep, batch, samples, prepare, options):
    options = {"vision_budget": "FCTC", "max_new_tokens": 4, **WHOLE, **options}
    together = deep.generate(**batch, **options).unflatten(0, (3, -1))
    for row, sample in enumerate(samples):
        assert torch.equal(together[row, :, -4:], deep.generate(**prepare(sample), **options)[:, -4:])


def test_samples_are_drawn_alike(deep, single):
    options = {"vision_budget": "CCTC", "max_new_tokens": 4, "do_sample": True, **WHOLE}
    torch.manual_seed(3)
    expected = deep.generate(**single, **options, num_return_sequences=3)
    torch.manual_seed(3)
    repeated = {name: value.repeat_interleave(3, 0) for name, value in single.items()}
    assert torch.equal(deep.generate(**repeated, **options), expected)


@pytest.mark.parametrize("schedules", DEPTHS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_samples_of_several_schedules_are_read_as_if_alone(mixed, batch, samples, prepare, schedules, options):
    options = {**WHOLE, **options, "max_new_tokens": 5}
    together = mixed.generate(**batch, **options, complexity=DEPTHS[schedules])
    for row, (sample, schedule) in enumerate(zip(samples, schedules.split())):
        assert chosen(float(DEPTHS[schedules][row])) == schedule
        assert torch.equal(
            together[row, -5:], mixed.generate(**prepare(sample), **options, vision_budget=schedule)[0, -5:]
        )
        assert together[row, -5:].tolist() == plain_pass(mixed, prepare(sample), schedule, 5) or "num_beams" in options


@pytest.mark.parametrize("schedules", DEPTHS)
def test_turns_of_several_schedules(mixed, tokenizer, prepare, samples, make_image, schedules):
    """Text, then another image, then text: a batch on one cache, against every sample on a cache of its own."""
    more = tokenizer(" two<end_of_utterance>\nUser: and where?", return_tensors="pt", add_special_tokens=False)
    more = more["input_ids"]
    images = [("and here?", [make_image(seed, 128, 64)]) for seed in (7, 8, 9)]

    def talk(rows):
        cache, logits = DynamicCache(config=mixed.config.text_config), []
        for inputs in (prepare(*(samples[row] for row in rows)), prepare(*(images[row] for row in rows))):
            given = {**WHOLE, "complexity": DEPTHS[schedules][rows], "past_key_values": cache}
            if cache.get_seq_length():
                del inputs["attention_mask"]
            logits.append(mixed(**inputs, **given).logits[:, -1])
            text = more.expand(len(rows), -1)
            logits.append(mixed(input_ids=text, past_key_values=cache).logits[:, -1])
        return torch.stack(logits, 1)

    with torch.no_grad():
        together = talk([0, 1, 2])
        for row in range(3):
            assert torch.allclose(together[row], talk([row])[0], atol=1e-4)


@pytest.mark.parametrize("schedule", ["FCTF", "CCCC"])
def test_turns_of_text_equal_the_whole_prompt(deep, single, tokenizer, schedule):
    check_turns_of_text(deep, single, tokenizer, vision_budget=schedule, **WHOLE)


@pytest.mark.parametrize("schedule", ["CCCC", "FCTC"])
def test_a_second_image_equals_the_whole_prompt_and_does_not_change_what_came_before(
    deep, prepare, make_image, schedule
):
    options = {**WHOLE, "vision_budget": schedule}
    first, second = (prepare(("what is it?", [make_image(seed, 128, 64)])) for seed in (0, 1))
    joined = {name: torch.cat([first[name], second[name]], 1) for name in second}
    del second["attention_mask"]
    cache, length = DynamicCache(config=deep.config.text_config), first["input_ids"].shape[1]
    with torch.no_grad():
        before = deep(**first, **options, past_key_values=cache).logits
        after = deep(**second, **options, past_key_values=cache).logits
        together = deep(**joined, **options).logits
    assert torch.allclose(together[:, :length], before, atol=1e-4)
    assert torch.allclose(together[:, length:], after, atol=1e-4)


def test_a_cropped_cache_still_sees_the_images(deep, single, tokenizer):
    more = tokenizer(" two and where?", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        cache = deep(**single, **WHOLE, vision_budget="FCTC")[CACHE]
        expected = deep(input_ids=more, past_key_values=copy.deepcopy(cache)).logits
        deep(input_ids=more.flip(1), past_key_values=cache)
        for layer in cache.layers:
            layer.keys, layer.values = (each[:, :, : -more.shape[1]] for each in (layer.keys, layer.values))
        assert torch.equal(deep(input_ids=more, past_key_values=cache).logits, expected)


def test_a_sample_without_an_image_beside_others(deep, samples, prepare, tokenizer):
    mixture = [samples[0], ("how are you?", [])]
    options = {"vision_budget": "FCTC", "max_new_tokens": 4, **WHOLE}
    together = deep.generate(**prepare(*mixture), **options)
    assert torch.equal(together[0, -4:], deep.generate(**prepare(samples[0]), **options)[0, -4:])
    assert torch.equal(together[1, -4:], deep.generate(**prepare(mixture[1]), **options)[0, -4:])


@pytest.mark.parametrize("selection", ["before_encoder", "after_encoder", "blocks"])
@pytest.mark.parametrize("pruning", [{}, {"prune_layer": 2}])
def test_with_a_selection_and_pruning(deep, batch, samples, prepare, selection, pruning):
    options = {"vision_budget": "CFCC", "min_tiles": 2, "max_tiles": 2, "min_visual_tokens": 7, "max_visual_tokens": 7}
    options |= {"selection": selection, "max_new_tokens": 4, **pruning}
    together = deep.generate(**batch, **options)
    for row, sample in enumerate(samples):
        assert torch.equal(together[row, -4:], deep.generate(**prepare(sample), **options)[0, -4:])


# Training


def labelled(inputs):
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    return inputs | {"labels": labels}


def test_gradients_reach_blocks_and_what_they_see(deep, single):
    model = copy.deepcopy(deep).train()
    model(**labelled(single), **WHOLE, vision_budget="CCCC").loss.backward()
    for block in model.model.vision_blocks:
        assert all(weight.grad.any() for weight in block.parameters())
    assert model.model.connector.modality_projection.proj.weight.grad.any()


def test_a_closed_gate_learns(make_deep, single):
    model = make_deep(vision_cross="block").train()
    model(**labelled(single), **WHOLE, vision_budget="FCCT").loss.backward()
    opens = [bool(block.gate.grad.any()) for block in model.model.vision_blocks]
    assert opens == [False, True, True, False]
    assert all(weight.grad is not None for weight in model.model.vision_blocks.parameters()), "DDP would wait"


def test_checkpointing_gives_the_same_gradients(deep, batch):
    gradients = []
    for checkpointed in (False, True):
        model = copy.deepcopy(deep).train()
        if checkpointed:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        loss = model(**labelled(batch), **WHOLE, vision_budget="FCTC").loss
        loss.backward()
        gradients.append([loss] + [weight.grad for weight in model.parameters() if weight.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*gradients))


def test_gates_of_the_relaxed_selection_train_the_selector(make_deep, single):
    """Through the blocks alone: no marker of a tile is gated, and no other layer sees visual tokens."""
    model = open_gates(make_deep(vision_cross="block")).train()
    given = {"selection": "after_encoder", "pointer": "selector", "min_visual_tokens": 3, "max_visual_tokens": 9}
    for schedule, learns in (("TTTT", False), ("CCCC", True)):
        model.zero_grad()
        model(**labelled(single), **given, vision_budget=schedule).loss.backward()
        assert bool(model.model.selector.tile_key.weight.grad.any()) == learns


@torch.no_grad()
def test_a_gate_of_minus_infinity_hides(deep, single):
    model = copy.deepcopy(deep)
    for block in model.model.vision_blocks:
        block.conv.weight.zero_()  # it would let neighbours tell of hidden tokens
    ids = single["input_ids"]
    embeds, visual = model.get_input_embeddings()(ids), ids == model.config.image_token_id
    embeds[visual] = encode_all(model, single).flatten(0, 1)
    hidden = visual & (torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    shown, positions = torch.ones_like(ids), torch.arange(ids.shape[1])[None]

    def read(mask, gates):
        interaction = Interaction((("cross",) * 4,), 4, torch.ones_like(visual), visual, gates)
        inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
        return read_layers(model.model.text_model, inputs, None, interaction, {}, model.model.vision_blocks)[0][:, -1]

    gated = read(shown, torch.where(hidden, -1e4, 0.0))
    assert torch.allclose(gated, read(shown * ~hidden, None), atol=1e-4)
    assert not torch.allclose(gated, read(shown, None), atol=1e-2)


# The convolution


def test_a_convolution_stays_within_runs():
    torch.manual_seed(0)
    conv = torch.nn.Conv1d(6, 6, 7, padding=3, groups=6, bias=False)
    columns = torch.tensor([[-1, -1, 2, 3, 4, 5, 7, 8, 20], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    states = torch.randn(2, 9, 6)
    states[0, :2] = 0
    made = convolve(conv, states, places_apart(columns, 3))
    runs = [(0, 2, 6), (0, 6, 8), (0, 8, 9), (1, 0, 9)]
    for row, first, end in runs:
        assert torch.allclose(made[row, first:end], conv(states[row, first:end].T[None])[0].T, atol=1e-6)


# Checkpoints


SCRIPT = """
import json, sys
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "modeling_qgsa" not in sys.modules
print(json.dumps(model.generate(**load_file(sys.argv[2]), vision_budget="FCCT", max_new_tokens=5).tolist()))
"""


def test_saved_equals_loaded_in_a_fresh_process(deep, batch, tmp_path):
    deep.save_pretrained(tmp_path / "checkpoint")
    save_file({name: value.contiguous() for name, value in batch.items()}, tmp_path / "inputs")
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", SCRIPT, tmp_path / "checkpoint", tmp_path / "inputs"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    expected = deep.generate(**batch, vision_budget="FCCT", max_new_tokens=5)
    assert json.loads(done.stdout.splitlines()[-1]) == expected.tolist()
    assert not torch.equal(deep.generate(**batch, vision_budget="FTTT", max_new_tokens=5), expected)


def test_a_checkpoint_without_blocks_gets_new_ones(make_deep, single, tmp_path):
    plain = make_deep()
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path, vision_cross="block")
    for block in loaded.model.vision_blocks:
        assert not block.is_trained and not block.conv.weight.any() and (block.text_norm.weight == 1).all()
        assert float(block.query.weight.detach().std()) == pytest.approx(32**-0.5, rel=0.2)
    with torch.no_grad():
        text = plain(**single, **WHOLE, vision_budget="FTTF").logits
        assert torch.equal(loaded(**single, **WHOLE, vision_budget="FCCF").logits, text)


def test_sizes_of_published_checkpoints():
    """VISOR adds 7.5 % of weights: so do these, nearly."""
    sizes = {
        "256m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
        "500m": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15},
    }
    for size, share in (("256m", 0.066), ("500m", 0.087)):
        text = sizes[size] | {"vocab_size": 49280, "head_dim": 64, "model_type": "llama"}
        text["num_key_value_heads"] = text["num_attention_heads"] // 3
        config = QGSAConfig(text_config=text, vision_cross="block")
        with torch.device("meta"):
            block = sum(weight.numel() for weight in VisionBlock(config).parameters())
        width, heads = text["hidden_size"], text["num_attention_heads"]
        layer = width * (64 * (2 * heads + 2 * heads // 3) + 3 * text["intermediate_size"]) + 2 * width
        whole = text["num_hidden_layers"] * layer + text["vocab_size"] * width
        assert text["num_hidden_layers"] * block / whole == pytest.approx(share, abs=5e-4)


def test_shares_of_the_work():
    text = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    text |= {"head_dim": 64, "num_hidden_layers": 2, "model_type": "llama"}
    own, block = (QGSAConfig(text_config=text, vision_cross=each) for each in ("own", "block"))
    assert cross_share(own) == pytest.approx(384 / 6144)
    assert cross_share(block) == pytest.approx((256 + 256 * 7 / 576) / 6144)
    assert vision_share(("full", "cross"), block) < vision_share(("full", "cross"), own)


# What is refused


def test_an_unknown_form_is_refused(make_deep):
    with pytest.raises(Exception, match=r"vision_cross \('blocks'\): choose from own, block"):
        make_deep(vision_cross="blocks")


def test_untrained_blocks_cannot_be_ranked(make_deep, deep, processor, make_image):
    samples = [{"image": make_image(0, 128, 64), "question": "what is it?"}]
    with pytest.raises(ValueError, match=r'vision_cross \("block"\): the blocks of this model were never trained'):
        make_deep(vision_cross="block").rank_vision_layers(samples, processor)
    found = copy.deepcopy(deep).rank_vision_layers(samples, processor)
    assert found["schedules"][0] == "FFFF" and found["divergence"][1] > 0
    assert isinstance(deep, QGSASmolVLMForConditionalGeneration)
