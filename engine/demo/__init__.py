"""The built-in demo model: its text, tokenizer, network, training and evaluation."""
