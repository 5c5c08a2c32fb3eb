"""Training itself: trainer, losses, teachers, and the output of a run."""
