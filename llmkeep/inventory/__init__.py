"""The inventory of an estate: written, checked, and drawn, without contacting a host."""
