"""Answers of vLLM with our plugin, for tests that run in an environment without vLLM.

    .venv-vllm/bin/python tests/hub_cards/vllm_answers.py CHECKPOINT < calls.json > answers.json

A call is `{"conversations": [...], "mm_processor_kwargs": {...}}`, the conversations of one batch in OpenAI's format;
its result `{"answers": [...], "positions": [...], "tiles": [...]}`: text, length of the prompt with its images, and
tiles per call of the encoder; or `{"error": "..."}`.
"""

import json
import os
import sys


os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model in this process, so that its calls can be counted
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def answer(llm, call, counts):
    from vllm import SamplingParams

    counts.clear()
    greedy = SamplingParams(temperature=0, max_tokens=8)
    options = {"mm_processor_kwargs": call.get("mm_processor_kwargs")}
    try:
        outputs = llm.chat(call["conversations"], greedy, use_tqdm=False, **options)
    except ValueError as error:
        return {"error": str(error)}
    return {
        "answers": [each.outputs[0].text for each in outputs],
        "positions": [len(each.prompt_token_ids) for each in outputs],
        "tiles": list(counts),
    }


def main():
    from vllm import LLM

    given, counts = json.load(sys.stdin), []
    results, sys.stdout = sys.stdout, sys.stderr  # vLLM prints, too
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=1024, limit_mm_per_prompt={"image": 2})

    def count(model):
        tower = model.selecting.vision_model
        tower.register_forward_pre_hook(
            lambda module, args, kwargs: counts.append(len(kwargs["pixel_values"])), with_kwargs=True
        )

    llm.apply_model(count)
    json.dump([answer(llm, call, counts) for call in given], results)


if __name__ == "__main__":
    main()
