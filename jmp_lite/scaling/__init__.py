"""Loss scaling: the automata, gradients of a scaled loss, and optimizers that unscale, check, and skip."""
