"""The VQA-RAD scores."""
