"""From text to batches, and from conversations to tokens."""
