"""Any JAX function as a model: its jaxpr is read once, and evaluated with other backward rules."""
