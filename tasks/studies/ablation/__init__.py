"""The parts of `python -m tasks.studies.ablation`: many variants of one model, tried alike and put into tables."""
