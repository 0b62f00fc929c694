"""Average precision, by rules that are written down."""
