"""What bundles and hosts have: software bills of materials."""
