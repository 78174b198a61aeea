"""The estate's certificate authority."""
