"""Numbers of preference pairs: log-probabilities, rewards, and the loss that is made of them."""
