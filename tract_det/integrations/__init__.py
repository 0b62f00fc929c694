"""TrAct in the trainers of other libraries; only the module of a trainer imports its library."""
