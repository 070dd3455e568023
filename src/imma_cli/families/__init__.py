"""What differs between families of models, and nothing else."""
