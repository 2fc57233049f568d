"""How it is fast: one readable PyTorch form of each operator, and the dispatch to faster ones."""
