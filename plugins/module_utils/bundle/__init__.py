"""What a host takes from the mirror's bundle."""
