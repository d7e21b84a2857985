"""Stopping a training on request, so that it can go on."""
