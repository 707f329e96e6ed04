"""Fitting: calibration, training, and the loss each kind of model learns from."""
