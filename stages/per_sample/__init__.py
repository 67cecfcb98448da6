"""What a layer is, and how a model runs with weights of its own for each sample: by substitution, vmap or the loop."""
