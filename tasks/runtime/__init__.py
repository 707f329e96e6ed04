"""What runs a stage: its settings, its files, its record."""
