"""Pages that bring back what a memory was. What would change is shown first, and then done upon the snapshot
that it was planned upon, or not at all.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from agentfuse.errors import BusyError
from agentfuse.gateway.bodies import query_of
from agentfuse.gateway.ui.files import Step
from agentfuse.gateway.ui.forms import read_fields
from agentfuse.gateway.ui.remembered import Asked, Remembered, memory_page, snapshot_number
from agentfuse.sync.rewrite import RewritePlan, RewriteReport


class RewritePages:
    """The routes."""

    def __init__(self, remembered: Remembered) -> None:
        self._remembered = remembered

    def add_to(self, routes: APIRouter) -> None:
        """Register the routes."""
        routes.get("/agents/{agent_id}/restore")(self.plan_restore)
        routes.post("/agents/{agent_id}/restore")(self.restore)
        routes.get("/agents/{agent_id}/revert")(self.plan_revert)
        routes.post("/agents/{agent_id}/revert")(self.revert)

    async def plan_restore(self, request: Request) -> Response:
        asked = await self._remembered.asked(request)
        return await self._restore_page(request, asked, snapshot_number(query_of(request, "number")))

    async def restore(self, request: Request) -> Response:
        asked, fields = await self._remembered.asked(request), await read_fields(request)
        number, upon = (snapshot_number(fields.get(name, "")) for name in ("number", "upon"))
        try:
            report = await self._remembered.rewrite(
                asked.agent, lambda rewriter: rewriter.restore(number, asked.path, upon=upon)
            )
        except BusyError:
            return await self._restore_page(request, asked, number, has_moved=True)
        return _done(asked, report)

    async def plan_revert(self, request: Request) -> Response:
        asked = await self._remembered.asked(request)
        return await self._revert_page(request, asked, query_of(request, "execution"))

    async def revert(self, request: Request) -> Response:
        asked, fields = await self._remembered.asked(request), await read_fields(request)
        execution, upon = fields.get("execution", ""), snapshot_number(fields.get("upon", ""))
        try:
            report = await self._remembered.rewrite(
                asked.agent, lambda rewriter: rewriter.revert(execution, upon=upon)
            )
        except BusyError:
            return await self._revert_page(request, asked, execution, has_moved=True)
        return _done(asked, report)

    async def _restore_page(
        self, request: Request, asked: Asked, number: int, *, has_moved: bool = False
    ) -> Response:
        plan = await self._remembered.rewrite(
            asked.agent, lambda rewriter: rewriter.plan_restore(number, asked.path)
        )
        what = {"number": number, "path": asked.path}
        return _confirmation("restore.html", request, asked, plan, has_moved, **what)

    async def _revert_page(
        self, request: Request, asked: Asked, execution: str, *, has_moved: bool = False
    ) -> Response:
        plan = await self._remembered.rewrite(asked.agent, lambda rewriter: rewriter.plan_revert(execution))
        return _confirmation("revert.html", request, asked, plan, has_moved, execution=execution)


def _confirmation(
    template: str, request: Request, asked: Asked, plan: RewritePlan, has_moved: bool, **values: object
) -> Response:
    return memory_page(
        template,
        request,
        asked,
        code=409 if has_moved else 200,
        steps=[*asked.steps, Step("History", asked.href("/history")), Step("Go back")],
        plan=plan,
        has_moved=has_moved,
        **values,
    )


def _done(asked: Asked, report: RewriteReport) -> Response:
    """On to the new snapshot: what it changed is there to be seen."""
    if report.number is None:
        return RedirectResponse(asked.href("/history"), 303)
    return RedirectResponse(asked.href("/diff", before=report.number - 1, after=report.number, done=1), 303)
