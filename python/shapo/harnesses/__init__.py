"""Other people's evaluations, on our models: lm-eval, inspect_ai. Both are optional and imported when asked for."""
