"""The names that a configuration can choose from; no imports, so that checking them is quick."""

OPTIMIZERS = ("SGD", "Adam", "AdamW", "LAMB", "Muon")
LR_SCHEDULES = ("WarmupMultiStepLR", "WarmupCosineLR")
LAMBDA_SCHEDULES = ("constant", "linear", "cosine")
TRACKERS = ("tensorboard", "wandb", "trackio")
