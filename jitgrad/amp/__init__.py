"""Mixed precision: `autocast` chooses dtypes, `GradScaler` keeps small gradients of float16 above zero.

    scaler = jg.amp.GradScaler("cpu")

    @jg.compile
    def step(x, y):
        optimizer.zero_grad()
        with jg.autocast("cpu", dtype=jg.float16):
            loss = criterion(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)                  # does nothing when a gradient overflowed
        scaler.update()
        return loss
"""

from jitgrad.amp.mode import (
    autocast,
    custom_bwd,
    custom_fwd,
    get_autocast_dtype,
    is_autocast_available,
    is_autocast_cache_enabled,
    is_autocast_enabled,
    set_autocast_cache_enabled,
    set_autocast_dtype,
    set_autocast_enabled,
)
from jitgrad.amp.scaler import GradScaler

__all__ = ["GradScaler", "autocast", "custom_bwd", "custom_fwd", "get_autocast_dtype", "is_autocast_available",
           "is_autocast_cache_enabled", "is_autocast_enabled", "set_autocast_cache_enabled", "set_autocast_dtype",
           "set_autocast_enabled"]
