"""Answers of an exported folder under the installed transformers; tests run this script in each environment.

    python tests/compat/answer.py FOLDER FORMER IMAGE OUTPUT

Loads through the Auto classes, as a user would, and writes to OUTPUT (JSON) the tokens, positions and selections.
FORMER holds the same weights under the names of version 0.2, and is saved again in its place.
"""

import json
import sys

import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, DynamicCache


QUESTIONS = ("what shape does the red card show?", "how many cards are there?")


def load(folder: str, **options):
    """Model and processor of `folder`, through the class that this version of transformers has for them."""
    if transformers.__version__.startswith("4."):
        from transformers import AutoModelForVision2Seq as AutoModel

        return AutoModel.from_pretrained(folder, trust_remote_code=True, **options), AutoProcessor.from_pretrained(
            folder, trust_remote_code=True
        )
    from transformers import AutoModelForImageTextToText as AutoModel

    return AutoModel.from_pretrained(folder, trust_remote_code=True, **options), AutoProcessor.from_pretrained(
        folder, trust_remote_code=True, backend="pil"
    )


def ask(processor, image, *questions, **options):
    """Inputs of some questions about one image."""
    prompts = []
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompts.append(
            processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        )
    images = [[image]] * len(questions)
    return processor(text=prompts, images=images, padding=True, return_tensors="pt", **options)


def same_pixels(folder: str, image) -> bool:
    """Whether tiles that are cut on demand have the pixels of all tiles cut at once, resized by torchvision."""
    if transformers.__version__.startswith("4."):  # where the processor takes the other backend whatever it is told
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        processor.image_processor = AutoImageProcessor.from_pretrained(folder, use_fast=True)
        assert processor.image_processor.is_fast
    else:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True, backend="torchvision")
        assert processor.image_processor.backend == "torchvision"
    image = image.resize((333, 190))
    whole = ask(processor, image, QUESTIONS[0])["pixel_values"][0]
    lazy, single = (
        ask(processor, image, QUESTIONS[0], lazy_tiles=True, do_image_splitting=split)["lazy_tiles"]
        for split in (True, False)
    )
    assert (lazy.counts, single.counts) == ([len(whole)], [1])
    return torch.equal(lazy.cut([0] * len(whole), list(range(len(whole)))), whole)


def finds_the_question(model, processor, image) -> bool:
    """Whether the model selects by the question, without a mask, if an answer follows it in the prompt."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "moon"}]}
    text = processor.apply_chat_template([{"role": "user", "content": content}, answer])
    inputs = dict(processor(text=text, images=image, return_tensors="pt"))
    del inputs["question_mask"]
    expected = model.select(**ask(processor, image, QUESTIONS[0])).relevance
    return torch.equal(model.select(**inputs).relevance, expected)


def positions_of(model, inputs, **options) -> list:
    """The ids that `generate` returns, and the positions that the text model saw, step by step."""
    seen = []
    hook = model.model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"].tolist()), with_kwargs=True
    )
    ids = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)
    hook.remove()
    return [ids.tolist(), seen]


def chat_of(model, processor, inputs) -> list:
    """The ids of two turns on one cache, and the tokens that follow the first one in a loop over `forward`."""
    cache = DynamicCache()
    first = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, past_key_values=cache)
    turn = f"<end_of_utterance>\nUser:{QUESTIONS[1]}<end_of_utterance>\nAssistant:"
    more = processor.tokenizer(turn, add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = torch.cat([first, more.expand(len(first), -1)], 1)
    text = inputs["attention_mask"].new_ones(len(ids), ids.shape[1] - inputs["attention_mask"].shape[1])
    mask = torch.cat([inputs["attention_mask"], text], 1)
    second = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, past_key_values=cache
    )
    outputs = model(**inputs, use_cache=True)
    token, length = outputs.logits[:, -1:].argmax(-1), inputs["input_ids"].shape[1] + 1
    name = "cache" if "cache" in outputs else "past_key_values"  # since 5.24, and before
    outputs = model(input_ids=token, attention_mask=mask[:, :length], **{name: outputs[name]})
    return [second.tolist(), outputs.logits[:, -1].argmax(-1).tolist()]


def differing_layers(model, inputs, **options) -> list:
    """Ids of two turns on one cache whose layers hold different positions, greedy and by beams."""
    options |= {"selection": "after_encoder", "min_visual_tokens": 8, "max_visual_tokens": 8}
    options |= {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    cache = DynamicCache()
    first = model.generate(**inputs, **options, past_key_values=cache)
    ids = torch.cat([first, first[:, -6:]], 1)
    new = ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(len(ids), new)], 1)
    text = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    second = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **text)
    return [second.tolist(), model.generate(**inputs, **options, num_beams=2).tolist()]


def chosen_layers(model, inputs) -> list:
    """`differing_layers` of two samples that a policy reads with different schedules."""
    config = model.config
    config.vision_schedules, config.vision_policy = ["CTTTTT", "FFCCCT"], True
    found = differing_layers(model, inputs, complexity=torch.tensor([0.0, 1.0]))
    config.vision_schedules, config.vision_policy = None, False
    return found


def with_blocks(folder: str, inputs) -> list:
    """Whether blocks that the checkpoint lacks start closed, and `differing_layers` once they are open."""
    model, _ = load(folder, vision_cross="block")
    closed = not any(bool(block.gate.any()) for block in model.eval().model.vision_blocks)
    for number, weight in enumerate(model.model.vision_blocks.parameters(), start=7):
        weight.copy_(torch.linspace(-number, number, weight.numel()).sin().view_as(weight))
    return [closed, differing_layers(model, inputs, vision_budget="FCTFCC")]


def load_former(former: str, inputs) -> dict:
    """What becomes of weights that have their former names, loaded, saved and loaded again."""
    found = {"missing": [], "logits": []}
    for _ in range(2):
        model, processor = load(former, output_loading_info=True)
        model, report = model
        found["missing"].append(sorted(map(str, [*report["missing_keys"], *report["unexpected_keys"]])))
        found["logits"].append(model(**inputs).logits[0, -1].tolist())
        model.save_pretrained(former)
        processor.save_pretrained(former)
    return found


@torch.no_grad()
def main(folder: str, former: str, image: str, output: str):
    model, processor = load(folder)
    model.eval()
    processor.tokenizer.padding_side = "left"
    image = Image.open(image).convert("RGB")
    batch, single = ask(processor, image, *QUESTIONS), ask(processor, image, QUESTIONS[0])
    lazy = ask(processor, image, *QUESTIONS, lazy_tiles=True)
    selected = model.select(**batch)
    dense = model(**{**single, "selection": "dense"}).logits
    report = {
        "transformers": transformers.__version__,
        "model": type(model).__name__,
        "processor": type(processor).__name__,
        "inputs": {name: [list(value.shape), value.double().sum().item()] for name, value in batch.items()},
        "batch": positions_of(model, batch),
        "single": positions_of(model, single),
        "lazy": positions_of(model, lazy),
        "same pixels": same_pixels(folder, image),
        "chat": chat_of(model, processor, single),
        "batched chat": chat_of(model, processor, batch),
        "beams": model.generate(**batch, max_new_tokens=4, num_beams=2, do_sample=False).tolist(),
        "pruned": differing_layers(model, batch, prune_layer=2),
        "scheduled": differing_layers(model, batch, vision_budget="FCTFCC"),
        "policy": chosen_layers(model, batch),
        "blocks": with_blocks(folder, batch),
        "dense": positions_of(model, single, selection="dense"),
        "answers": processor.batch_decode(
            model.generate(**batch, max_new_tokens=6)[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        ),
        "visual_tokens": selected.visual_tokens.tolist(),
        "tiles": selected.tiles.tolist(),
        "pointed": model.select(**batch, pointer="attention", min_tiles=2, max_tiles=2).kept_tiles.tolist(),
        "found": finds_the_question(model, processor, image),
        "kept": selected.keep_indices.tolist(),
        "logits": model(**single).logits[0, -1].tolist(),
        "dense_logits": dense[0, -1].tolist(),
        "former": load_former(former, single),
        "drawn": list(processor.draw_selection(image, selected).size),
    }
    with open(output, "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
