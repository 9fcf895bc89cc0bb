"""A subspace's weights in a model: how they are found and bound, tapped in forward passes, and guarded meanwhile."""
