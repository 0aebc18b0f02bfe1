"""Checkpoints of other libraries in and out: Hugging Face folders, PEFT adapters, the hub."""
