"""A notebook's ways: cells that are run again, a running event loop, an interrupt. And Ctrl-C before a command has begun."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from durable_cluster import App, AppError

Eventually = Callable[..., None]
CELLS = '''
import asyncio
import os
import sys
from durable_cluster import App, sleep

sys.ps1 = "In : "
app = App("notebook", dsn=os.environ["DURABLE_DSN"])

def cell(text):
    exec(text, globals())

STEPS = """
@app.step
def shout(text: str) -> str:
    return text.upper() + MARK
"""
FLOW = """
@app.workflow
async def greeting(text: str) -> str:
    await sleep("1ms")
    return "%s " + await shout(text)
"""
MACHINE = """
machine = app.machine("machine", state=str)
@machine.step(start=True)
def begin(text: str):
    raise AssertionError("it was defined anew")
@machine.step(start=True)
def begin(ctx: Context, text: str):
    return ctx.done(text + MARK)
"""
from durable_cluster import Context
MARK = "."
cell(STEPS), cell(FLOW % "one"), cell(MACHINE)
app.schedule("daily", "@daily", greeting, "now")
app.schedule("daily", "@daily", greeting, "then")

async def kernel():
    """Cells run inside of the kernel's event loop."""
    first = greeting.start("first")
    app.run(until_idle=True)
    print(first.result(timeout=5), await first)
    cell(STEPS.replace("upper", "lower"))
    edited = greeting.start("SECOND")
    app.run(until_idle=True)
    print(await edited)
    cell(FLOW % "two"), cell(MACHINE)
    anew, other = greeting.start("THIRD"), machine.start("fourth")
    app.run(until_idle=True)
    print(await anew, await other)
    background = asyncio.create_task(app.run_async())
    print(await greeting.start("FIFTH"))
    background.cancel()
    await asyncio.gather(background, return_exceptions=True)
    print(background.cancelled())

asyncio.run(kernel())
app.close()
'''


def test_a_cell_that_is_run_again_defines_anew_and_runs_inside_of_an_event_loop(dsn: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CELLS],
        env={**os.environ, "DURABLE_DSN": dsn},
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == [
        "one FIRST. one FIRST.",
        "one second.",
        "two third. fourth.",
        "two fifth.",
        "True",
    ], done.stderr


def test_in_a_program_two_definitions_of_one_name_are_a_mistake() -> None:
    app = App("program")
    app.step(name="same")(lambda: None)
    with pytest.raises(AppError, match="has a step 'same' already"):
        app.step(name="same")(lambda: None)


def test_a_run_beside_an_event_loop_ends_when_it_is_cancelled_and_gives_back_what_it_held(
    dsn: str, conn: psycopg.Connection
) -> None:
    app = App("beside", dsn=dsn)

    @app.step
    async def threads() -> int:
        return threading.active_count()

    @app.workflow
    async def count() -> int:
        return await threads()

    async def main() -> None:
        assert await app.run_async(until_idle=True) == 0
        running = asyncio.create_task(app.run_async())
        assert await count.start() > 1
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(running, 10)

    asyncio.run(main())
    assert conn.execute("select count(*) from durable.win where owner <> 0").fetchone() == (0,)
    app.close()


def test_an_interrupt_ends_a_run_in_the_middle_of_a_step_which_then_runs_again(dsn: str) -> None:
    app = App("interrupted", dsn=dsn)
    runs: list[int] = []

    @app.step
    def long() -> int:
        runs.append(1)
        if len(runs) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        return len(runs)

    @app.workflow
    async def patient() -> int:
        return await long()

    handle = patient.start()
    with pytest.raises(KeyboardInterrupt):
        app.run()
    app.run(until_idle=True)
    assert handle.result(timeout=5) == 2
    app.close()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at what a process has loaded")
def test_ctrl_c_while_the_command_is_still_imported_leaves_no_traceback(eventually: Eventually) -> None:
    begin = Path(__file__).parent.parent / "ops" / "durable_cluster_command.py"
    for loaded in ("/msgspec/", "/psycopg_binary/"):
        with subprocess.Popen([sys.executable, begin, "doctor"], text=True, stderr=subprocess.PIPE) as process:
            maps = Path(f"/proc/{process.pid}/maps")
            eventually(lambda maps=maps, loaded=loaded: loaded in maps.read_text(), what=f"an import of {loaded}")
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=20)[1]
        assert (process.returncode, said) == (130, "\ndurable-cluster: interrupted\n")
