"""The A-OKVQA scores."""
