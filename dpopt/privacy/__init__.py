"""Everything left of `p.grad`: keyed randomness, Poisson sampling, gradients, clipping, noise, accounting."""
