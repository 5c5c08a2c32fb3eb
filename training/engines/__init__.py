"""Other inference engines, each in a process of its own that answers requests line by line."""
