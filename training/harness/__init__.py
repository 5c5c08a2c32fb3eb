"""Our evaluation inside other people's harnesses: tasks for lm-eval and lmms-eval, and a model for lmms-eval."""
