"""Groups of duplicates, page by page, and the paths of the images that need not be kept."""

import os
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Query, Response

from clipvisionalign.search.duplicates import DuplicateGroup
from clipvisionalign.search.duplicates.report import KINDS
from clipvisionalign.search.server.duplicate_job import JobProgress, KeptReport, ReportGoneError
from clipvisionalign.search.server.errors import translate_errors
from clipvisionalign.search.server.service import SearchService

#: Images of a group, and images that could not be verified, that one answer names.
MAX_MEMBERS, MAX_NAMED = 60, 100

ReportParam = Annotated[str, Query(max_length=64, description="'report' of the first page")]


def add_duplicate_routes(app: FastAPI, service: SearchService) -> None:
    """Add /duplicates and /duplicates/paths.

    Args:
        app: The application.
        service: Its state.
    """
    limits = service.limits
    IndexParam = Annotated[int, Query(ge=0, lt=len(service.searchers), description="which index")]

    @app.get("/duplicates", responses={202: {"description": "The groups are being made"}, 410: {}, 422: {}})
    def duplicates(
        response: Response,
        kind: Annotated[
            Literal["", "bytes", "nearly", "scene"], Query(description="of which kind; empty for bytes and nearly")
        ] = "",
        count: Annotated[int, Query(ge=1, le=limits.results, description="groups of one answer")] = 20,
        offset: Annotated[int, Query(ge=0, lt=2**31, description="how many of the first groups to leave out")] = 0,
        report: ReportParam = "",
        index: IndexParam = 0,
    ) -> dict[str, Any]:
        """Groups of duplicates: the same bytes, nearly the same, or one scene; made on the first request."""

        def work() -> dict[str, Any]:
            kept = _report(service, index, report, kind == "scene")
            if isinstance(kept, JobProgress):
                response.status_code = 202
                return {
                    "state": "computing", "step": kept.step, "done": kept.done, "of": kept.total,
                    "seconds": round(kept.seconds, 1), "groups": [], "total": 0,
                }  # fmt: skip
            return _page(kept, kind, offset, count) | {"decides": service.stores_decisions(index)}

        return translate_errors(work)

    text: dict[str, Any] = {"content": {"text/plain": {}}}

    @app.get("/duplicates/paths", response_class=Response, responses={200: text, 202: {}, 410: {}, 422: {}})
    def paths(report: ReportParam = "", index: IndexParam = 0) -> Response:
        """Paths of all images that need not be kept, one a line, as the command 'duplicates --paths' prints them."""

        def work() -> Response:
            kept = _report(service, index, report, scenes=False)
            if isinstance(kept, JobProgress):
                return Response(b"", 202, media_type="text/plain")
            folder = os.fsencode(f"{service.searchers[index].manifest.folder}/")
            content = b"".join(folder + image.raw + b"\n" for image in kept.not_kept)
            headers = {"Content-Disposition": 'attachment; filename="not-kept.txt"'}
            return Response(content, media_type="text/plain", headers=headers)

        return translate_errors(work)


def _report(service: SearchService, index: int, name: str, scenes: bool) -> KeptReport | JobProgress:
    job = service.duplicates[index]
    try:
        return job.kept(name) if name else job.current(scenes)
    except ReportGoneError as error:
        raise HTTPException(410, str(error)) from None


def _page(kept: KeptReport, kind: str, offset: int, count: int) -> dict[str, Any]:
    numbered = [
        (number, each)
        for number, each in enumerate(kept.groups)
        if each.kind == kind or (not kind and each.kind != "scene")
    ]
    report, others = kept.report, kept.not_kept
    return {
        "state": "ready",
        "report": kept.name,
        "groups": [_group_to_dict(number, each) for number, each in numbered[offset : offset + count]],
        "total": len(numbered),
        "counts": {each: len(report.of_kind(each)) for each in KINDS if each != "scene" or kept.has_scenes},
        "images": report.images,
        "not_kept": len(others),
        "not_kept_bytes": sum(image.size for image in others),
        "pairs": report.pairs,
        "not_verified": [{"path": path, "reason": why} for path, why in report.not_verified[:MAX_NAMED]],
        "not_verified_images": len(report.not_verified),
    }


def _group_to_dict(number: int, group: DuplicateGroup) -> dict[str, Any]:
    shown = DuplicateGroup(group.kind, group.images[:MAX_MEMBERS], group.cosines[:MAX_MEMBERS], group.reason)
    return {"number": number, "members": len(group.images)} | shown.to_dict()
