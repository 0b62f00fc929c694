"""Average precision and top-k accuracy by documented rules, and the comparison of runs by them."""
