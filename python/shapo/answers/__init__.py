"""Answers of a model to prompts: what ends one, the engines that decode, and the file that holds them."""
