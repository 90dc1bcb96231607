"""The service: FastAPI, one transaction a request, and every call of a workflow within it or beside the event loop.

POST /orders                   the order's row and its workflow, in one transaction
GET  /orders/{ref}             where it stands
POST /orders/{ref}/decision    the row of who decided and the signal, in one transaction
GET  /orders/{ref}/events      where it stands, whenever that changes, as server-sent events
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from secrets import token_hex
from typing import Annotated, Any

import msgspec
import psycopg
from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from durable_cluster import UnknownWorkflow, WorkflowHandle
from durable_cluster.examples.web.flows import Order, app, fulfil, prepare

LOOK_S = 0.1


class Wish(BaseModel):
    """The body of an order."""

    article: str
    cents: int


class Verdict(BaseModel):
    """The body of a decision."""

    approved: bool
    by: str


class Standing(BaseModel):
    """Where an order stands. ``result``: once it has ended well."""

    ref: str
    status: str
    progress: Any = None
    result: Any = None


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """The tables; and, so that one process is all there is to try, the workflows. A cluster runs them elsewhere."""
    await asyncio.to_thread(prepared)
    workflows = asyncio.create_task(app.run_async())
    yield
    workflows.cancel()
    await asyncio.wait([workflows])


def prepared() -> None:
    with psycopg.connect(app.client.dsn, autocommit=True) as connection:
        prepare(connection)


service = FastAPI(lifespan=lifespan)


async def transaction() -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """The request's own: committed when its function returns, rolled back when it raises. A real one takes it from a pool."""
    async with await psycopg.AsyncConnection[Any].connect(app.client.dsn) as connection:
        yield connection


# The function scope: the commit is over, and may have failed, before the answer is sent.
Transaction = Annotated[psycopg.AsyncConnection[Any], Depends(transaction, scope="function")]


@service.post("/orders", status_code=201)
async def order(wish: Wish, tx: Transaction) -> Standing:
    """The row breaks a rule of the table: then there is no workflow either."""
    new = Order(token_hex(8), wish.article, wish.cents)
    await fulfil.start_async(new, key=new.ref, tx=tx)
    try:
        await tx.execute("insert into web.purchase values (%s, %s, %s)", msgspec.structs.astuple(new))
    except psycopg.errors.CheckViolation as error:
        raise HTTPException(422, "an order is of 1 to 1,000,000 cents") from error
    return Standing(ref=new.ref, status="running")


@service.get("/orders/{ref}")
async def look(ref: str) -> Standing:
    return await standing(ref, await known(ref))


@service.post("/orders/{ref}/decision", status_code=202)
async def decide(ref: str, verdict: Verdict, tx: Transaction) -> Standing:
    """The first decision counts: the second has no place in the table, and is not sent."""
    handle = await known(ref)
    try:
        await tx.execute("insert into web.decision values (%s, %s, %s)", (ref, verdict.approved, verdict.by))
        await handle.signal_async("decided", verdict.model_dump(), actor=verdict.by, tx=tx)
    except (psycopg.errors.UniqueViolation, UnknownWorkflow) as error:
        raise HTTPException(409, "it is decided already") from error
    return await standing(ref, handle)


@service.get("/orders/{ref}/events")
async def events(ref: str) -> StreamingResponse:
    return StreamingResponse(changes(ref, await known(ref)), media_type="text/event-stream")


async def changes(ref: str, handle: WorkflowHandle[dict[str, str]]) -> AsyncIterator[str]:
    """Each standing that differs from the one before, until the order has ended. A browser that leaves ends it too."""
    told = None
    while told is None or told.status == "running":
        now = await standing(ref, handle)
        if now != told:
            yield f"data: {now.model_dump_json()}\n\n"
        else:
            await asyncio.sleep(LOOK_S)
        told = now


async def known(ref: str) -> WorkflowHandle[dict[str, str]]:
    try:
        return await fulfil.get_async(key=ref)
    except UnknownWorkflow as error:
        raise HTTPException(404, "there is no such order") from error


async def standing(ref: str, handle: WorkflowHandle[dict[str, str]]) -> Standing:
    status = await handle.status_async()
    result = await handle if status == "completed" else None
    return Standing(ref=ref, status=status, progress=await handle.progress_async(), result=result)
