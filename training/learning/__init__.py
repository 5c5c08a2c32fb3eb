"""The training proper: trainer, losses, teachers, and what a run leaves behind."""
