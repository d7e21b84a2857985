"""Instruction conversations: written by rule or by an endpoint, checked, reviewed."""
