"""Data sets: `cards` (generated) and `vqa_rad`, each a map-style data set of question samples."""
