"""The parts of `python -m tasks.studies.ablation`: many variants of one model, run and told alike."""
