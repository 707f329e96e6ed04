"""The parts of `python -m tasks.ablate`: many variants of one model, run and told alike."""
