"""Pure torch: noise schedules, conditioning encoders, denoisers, samplers, the scale network, and training steps.

clean: the unit delta Ω_0; noisy: Ω_t = sqrt(ᾱ_t) Ω_0 + sqrt(1 − ᾱ_t) ε; schedule: the β_t; denoiser: predicts Ω_0 or ε from
Ω_t, t and the conditioning; sampler: from pure noise to a clean unit delta.
"""
