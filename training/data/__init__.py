"""Visual question answering data sets, one file each, and the collator that turns their samples into model inputs."""
