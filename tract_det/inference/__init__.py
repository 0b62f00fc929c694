"""Models in use, without a data set or a configuration: a file of weights says all they need."""
