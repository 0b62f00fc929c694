"""Training and inference loops on DeepSpeed. Knows no model, data set or config."""
