"""Tiny stand-ins for SmolVLM and CLIP, trained from scratch."""
