"""The RefCOCO metric."""
