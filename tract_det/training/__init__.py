"""Training and evaluation runs as a configuration describes them. The only reader of a `cfg`.

`session` is the one spine; `detection` and `classification` say what it trains and evaluates on;
`assembly` makes optimizer, schedules, TrAct and DeepSpeed's engine from the shared keys.
"""
