"""LLaVA-Ultra in plain torch and transformers."""
