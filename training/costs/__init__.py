"""What an answer costs: FLOPs, seconds, memory."""
