"""What `adapt` may do around any trainable method: gradient steps, prototypes, meta-learned starts, pseudo-labels."""
