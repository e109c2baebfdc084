"""What all tests share: async tests run on a fresh event loop of their own."""

import asyncio
import inspect
import signal
import subprocess
from typing import Any

import hypothesis
import pytest

from tests import warm
from tests.real_cluster import cluster

__all__ = ["cluster"]

# Some tests serve a mount from a thread of this very process. A vfork holds the interpreter's lock until the child has
# replaced itself; a child that touches the mount before (to close a file of it, or to enter it) would wait for ever.
subprocess._USE_VFORK = False  # type: ignore[misc]  # the documented switch (subprocess, "vfork")


# How long an example takes, or is thought up, says what else the machine does.
hypothesis.settings.register_profile(
    "mendfs", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("mendfs")

# Whoever runs the tests in the background of a shell has SIGINT ignored, and every program inherits that: then Ctrl-C,
# which some tests press, would end nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def` tests with asyncio.run: a new loop each, closed with everything it left behind."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments: dict[str, Any] = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    asyncio.run(pyfuncitem.obj(**arguments))
    return True


def pytest_unconfigure() -> None:
    """Everything that ran for all tests ends."""
    warm.close()
