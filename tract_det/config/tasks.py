"""Which task a configuration is of: its keys say so."""

from collections.abc import Callable
from pathlib import Path

from fvcore.common.config import CfgNode

from tract_det.config import classification, detection
from tract_det.config.files import find_configs, flat, read_config
from tract_det.config.machinery import ConfigFiles
from tract_det.errors import UserError

# The verb of `tract-det` that runs a task, and the module of `tract_det.training` that has it.
VERBS = {"detection": "train", "classification": "pretrain"}
_OF = {"detection": "a detector's", "classification": "a classifier's"}
MODULES = {"detection": detection, "classification": classification}


def task_of(config_files: ConfigFiles) -> str:
    """The task that knows more of the files' keys: "detection" or "classification".

    Raises:
        UserError: a file does not exist or cannot be read.
    """
    names = [config_files] if isinstance(config_files, str | Path) else config_files
    paths = [path for name in names for path in find_configs(name)[0]]
    keys = {key for path in paths for key in flat(read_config(path))}
    return max(MODULES, key=lambda task: len(keys & set(flat(MODULES[task].get_cfg()))))


def refuse_other_task(task: str, config_files: ConfigFiles) -> None:
    """Refuses config files that are the other task's: it knows all of their keys.

    Raises:
        UserError: names the files and the verb to use.
    """
    names = [config_files] if isinstance(config_files, str | Path) else config_files
    paths = [path for name in names for path in find_configs(name)[0]]
    keys = {key for path in paths for key in flat(read_config(path))}
    keys = {key for key in keys if not key.startswith("DEEPSPEED.")}  # it takes any
    for other, module in MODULES.items():
        if keys <= set(flat(module.get_cfg())) and not keys <= set(flat(MODULES[task].get_cfg())):
            files = " ".join(map(str, paths))
            raise UserError(f"{files}: this is {_OF[other]} config: tract-det {VERBS[other]}")


def loader_of(task: str) -> Callable[..., CfgNode]:
    """The `load_cfg` of a task."""
    return MODULES[task].load_cfg
