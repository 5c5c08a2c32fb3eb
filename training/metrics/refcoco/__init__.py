"""The RefCOCO scores."""
