"""Our evaluation inside other harnesses: tasks for lm-eval and lmms-eval, and a model for lmms-eval."""
