"""Compiled programs that are kept between processes, for the command line and for Python."""

import os
from pathlib import Path

import jax


def keep_programs() -> None:
    """Keep compiled programs in the user's cache folder, or where JAX_COMPILATION_CACHE_DIR specifies.

    Without a folder that can be used, none are kept.
    """
    try:
        chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
        folder = chosen or str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokentm_jax")
        if "://" not in folder:
            os.makedirs(folder, exist_ok=True, mode=0o700)
            os.listdir(folder)
        if not chosen:
            jax.config.update("jax_compilation_cache_dir", folder)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    except (OSError, RuntimeError):  # a file, a folder of somebody else, no home
        jax.config.update("jax_compilation_cache_dir", None)


def keep_unless_told() -> None:
    """`keep_programs`, unless JAX has a folder, or is told to keep none (JAX_ENABLE_COMPILATION_CACHE=false)."""
    if jax.config.values["jax_enable_compilation_cache"] and not jax.config.values["jax_compilation_cache_dir"]:
        keep_programs()
