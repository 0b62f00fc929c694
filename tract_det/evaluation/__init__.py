"""Average precision and top-k accuracy by documented rules."""
