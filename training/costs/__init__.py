"""Cost of an answer: FLOPs, seconds, memory."""
