"""Overfitting: the recipe, the gradient steps of each method, how many samples at once, and writing them into the store."""
