"""The VQA-RAD metric."""
