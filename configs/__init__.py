"""Data only: the YAML files, so that a wheel carries them."""
