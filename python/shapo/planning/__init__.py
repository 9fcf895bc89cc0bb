"""What an update costs, from a model's shapes alone: memory by part, passes, bytes between ranks (`shapo plan`)."""
