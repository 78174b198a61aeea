"""Known vulnerabilities of what hosts have installed, by databases that the bundle carries."""
