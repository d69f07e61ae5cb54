"""The story of a request. Read it aloud; the steps are in run.py, what they hold and give back in lifecycle.py."""

from __future__ import annotations

import asyncio

from python_backends.core.errors import BatonError, EngineFailure, WorkerLost
from router.run import Run


async def serve(run: Run) -> None:
    """From arrival to the last token. Ends with exactly one last piece or one error, and with nothing held.

    A worker that dies under the request costs another attempt, which continues after the tokens already sent.
    """
    try:
        await run.enter()
        while not run.ended:
            try:
                decision = await run.route()
                loan = await run.borrow(decision.lender) if decision.lender else None
                ticket = await run.prefill(decision.prefill, loan) if decision.prefill else None
                if not run.ended:
                    await run.decode(decision.decode, ticket)
            except (WorkerLost, EngineFailure) as error:
                run.retry(error)
    except BatonError as error:
        run.fail(error)
    except asyncio.CancelledError:
        run.fail(run.interruption)
