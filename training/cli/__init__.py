"""Command lines: options, presets, errors in one line."""
