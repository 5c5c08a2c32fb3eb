"""The A-OKVQA metric."""
