"""FLOPs of an answer by formula: QGSA's own table, and beside it what the whole answer costs.

python training/flops.py HuggingFaceTB/SmolVLM-256M-Instruct HuggingFaceTB/SmolVLM-500M-Instruct
"""

from training.costs.flops import main


if __name__ == "__main__":
    main()
