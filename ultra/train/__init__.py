"""The two stages."""
