"""Images, captions and latents, from shards to batches."""
