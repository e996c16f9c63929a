"""What the plan and the folds need to know of the real model, measured on a few texts."""
