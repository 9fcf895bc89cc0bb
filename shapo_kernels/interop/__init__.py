"""What other libraries do to a model's weights: sharding, DeepSpeed, PEFT, quantisation, wrappers' names."""
