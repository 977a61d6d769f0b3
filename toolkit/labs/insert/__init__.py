"""What is measured about methods that insert something small into a frozen network."""
