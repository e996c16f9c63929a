"""Calibration: measures on a few texts what the plan and the folds need to know about the real model."""
