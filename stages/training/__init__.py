"""Training the denoiser and the scale network: batches, steps, checkpoints, ranks, memory, tuning."""
