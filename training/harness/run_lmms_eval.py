"""The command line of lmms-eval, with QGSA-SmolVLM among its models as `qgsa_smolvlm`.

    python training/harness/run_lmms_eval.py --model qgsa_smolvlm \\
        --model_args pretrained=FOLDER,max_tiles=4,max_visual_tokens=64 \\
        --tasks qgsa_cards --include_path training/harness/lmms_eval_tasks --batch_size 16 --limit 32

All options are those of `python -m lmms_eval`; so are its tasks, as long as they show images. For several GPUs:
`accelerate launch training/harness/run_lmms_eval.py ...`.
"""

from importlib.util import find_spec

from training.cli.arguments import end_with_error


def main():
    if find_spec("lmms_eval") is None:
        end_with_error("lmms-eval is not installed: pip install -e '.[train,harness]'")
    from lmms_eval.__main__ import cli_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2

    from training.harness.lmms_model import MANIFEST

    MODEL_REGISTRY_V2.register_manifest(MANIFEST)
    cli_evaluate()


if __name__ == "__main__":
    main()
