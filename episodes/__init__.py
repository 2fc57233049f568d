"""What is asked: types, readers, sampling, manifests and loading of episodes."""
