"""Training, evaluation and measurement of question-guided selection for SmolVLM."""
