"""What the serving and the training payload share."""
