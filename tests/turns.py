"""Later turns of a conversation on a filled cache, for tests of what layers see."""

import copy

import torch

from modeling_qgsa.compat_qgsa import CACHE


@torch.no_grad()
def check_turns_of_text(model, single, tokenizer, **options):
    """A turn of text on the cache of a prompt equals the whole prompt, in a loop over `forward` and by `generate`."""
    more = " two<end_of_utterance>\nUser: and where?"
    more = tokenizer(more, return_tensors="pt", add_special_tokens=False)["input_ids"]
    whole = torch.cat([single["input_ids"], more], 1)
    question = torch.cat([single["question_mask"], torch.zeros_like(more)], 1)
    inputs = single | {"input_ids": whole, "attention_mask": torch.ones_like(whole), "question_mask": question}
    together = model(**inputs, **options).logits[:, -more.shape[1] :]
    cache = model(**single, **options)[CACHE]
    later = model(input_ids=more, past_key_values=copy.deepcopy(cache)).logits
    assert torch.allclose(later, together, atol=1e-4)
    expected = model.generate(**inputs, **options, max_new_tokens=4)
    assert torch.equal(model.generate(input_ids=whole, past_key_values=cache, max_new_tokens=4), expected)
