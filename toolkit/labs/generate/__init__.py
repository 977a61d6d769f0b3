"""What is measured about methods that move the sampler."""
