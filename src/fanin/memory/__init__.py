"""Memory of the training step: planned from shapes (`plan`), measured in processes of their own (`probe`), recorded."""
