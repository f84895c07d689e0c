"""Downstream tasks: fine-tuning and evaluation, from a configuration to a table."""
