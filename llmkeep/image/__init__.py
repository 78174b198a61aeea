"""An OCI image of what serves, made from a verified bundle alone."""
