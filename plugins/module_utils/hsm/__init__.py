"""Keys in the tokens of an HSM, by PKCS#11."""
