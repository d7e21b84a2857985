"""The tiny backbones that ultra ships, and the script that makes them."""
