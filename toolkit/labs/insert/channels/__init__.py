"""Two worlds for scales and shifts: a warped network on digits, and MNIST with few labels."""
