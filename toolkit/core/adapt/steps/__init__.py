"""What happens around each optimizer step."""
