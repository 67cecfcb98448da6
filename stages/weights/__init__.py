"""What a layer is, weights of one's own for each sample, overfitting, and the score that selects the layer."""
