"""Methods that move the sampler of a diffusion model: its noise, steps, resolution and path."""
