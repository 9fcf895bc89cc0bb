"""One ShaPO update: its two passes, its phases, the radius, the base optimizer's step, statistics."""
