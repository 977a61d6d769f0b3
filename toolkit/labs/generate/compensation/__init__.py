"""What the lab of DC-Solver is made of: worlds, arms, and the ratios that are shipped."""
