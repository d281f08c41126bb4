"""What is decided on groups of duplicates: that images are none, and which to keep.

A decision names a report and a group of it, so that it is on what a person has seen; decisions are written to the file
that the command `duplicates` writes to as well. No route deletes an image.
"""

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import Body, FastAPI, HTTPException, Query, Request
from pydantic import StringConstraints

from clipvisionalign.search.duplicate_decisions import Decision, Keeper, read_all
from clipvisionalign.search.duplicates import DuplicateGroup
from clipvisionalign.search.duplicates.decisions import add_decisions, remove_pairs
from clipvisionalign.search.duplicates.keepers import KeptMeanwhileError, choose_keeper, remove_keepers
from clipvisionalign.search.duplicates.quality import ImageFile
from clipvisionalign.search.server.duplicate_job import ReportGoneError
from clipvisionalign.search.server.errors import translate_errors
from clipvisionalign.search.server.judgement_routes import ImagePath, is_from_elsewhere
from clipvisionalign.search.server.service import SearchService

#: Pairs of images that one request takes back at most, and characters of a name or content hash.
MAX_PAIRS, MAX_NAME_LENGTH = 2000, 64
#: What a content hash is.
_HASH = re.compile(r"[0-9a-f]+")

Name = Annotated[str, StringConstraints(max_length=MAX_NAME_LENGTH)]
ReportBody = Annotated[str, Body(max_length=MAX_NAME_LENGTH, description="'report' of the answer with the group")]
GroupBody = Annotated[int, Body(ge=0, lt=2**31, description="'number' of the group")]


def add_decision_routes(app: FastAPI, service: SearchService) -> None:
    """Add /duplicates/decisions, to read and to decide that images are none, and /duplicates/forgotten.

    Args:
        app: The application.
        service: Its state.
    """
    limits = service.limits
    IndexParam = Annotated[int, Query(ge=0, lt=len(service.searchers), description="which index")]

    @app.get("/duplicates/decisions", responses={422: {}})
    def decisions(
        count: Annotated[int, Query(ge=1, le=limits.results)] = 20,
        offset: Annotated[int, Query(ge=0, lt=2**31)] = 0,
        index: IndexParam = 0,
    ) -> dict[str, Any]:
        """Decisions: pairs of images that are no duplicates, and images to keep, the last ones first."""
        return translate_errors(lambda: _decisions(service, index, offset, count))

    @app.post("/duplicates/decisions", responses={403: {}, 410: {}, 422: {}})
    def decide(request: Request, report: ReportBody, group: GroupBody, index: IndexParam = 0) -> dict[str, Any]:
        """A decision: no two images of a group are duplicates."""

        def work(location: Any) -> dict[str, Any]:
            images = _group(service, index, report, group).images
            if len(images) > limits.decided_images:
                raise ValueError(f"a group of {len(images):,} images; decisions are on {limits.decided_images} at most")
            added = add_decisions(location, [(image.hash, image.path) for image in images])
            return {"added": [each.hashes for each in added], "images": len(images)}

        return _store(service, request, index, work)

    @app.post("/duplicates/forgotten", responses={403: {}, 422: {}})
    def forget(
        request: Request,
        pairs: Annotated[
            list[tuple[Name, Name]],
            Body(max_length=MAX_PAIRS, description="content hashes of two images that are no duplicates"),
        ] = [],  # noqa: B006
        kept: Annotated[
            list[tuple[Name, ImagePath]],
            Body(max_length=MAX_PAIRS, description="content hash and path of an image to keep"),
        ] = [],  # noqa: B006
        index: IndexParam = 0,
    ) -> dict[str, Any]:
        """Decisions that are taken back: on these pairs and images and no others."""

        def work(location: Any) -> dict[str, Any]:
            removed = remove_pairs(location, pairs)
            return {"removed": [each.hashes for each in removed], "kept": len(remove_keepers(location, kept))}

        return _store(service, request, index, work)


def add_keeper_routes(app: FastAPI, service: SearchService) -> None:
    """Add /duplicates/keepers, to choose which image of a group is kept.

    Args:
        app: The application.
        service: Its state.
    """
    limits = service.limits
    IndexParam = Annotated[int, Query(ge=0, lt=len(service.searchers), description="which index")]

    @app.post("/duplicates/keepers", responses={403: {}, 404: {}, 409: {}, 410: {}, 422: {}})
    def keep(
        request: Request,
        report: ReportBody,
        group: GroupBody,
        image: Annotated[int | None, Body(ge=0, lt=2**63, description="number of the image; null takes it back")],
        replaces: Annotated[
            list[Annotated[int, Body(ge=0, lt=2**63)]],
            Body(max_length=limits.decided_images, description="images of the group that were chosen before"),
        ] = [],  # noqa: B006
        index: IndexParam = 0,
    ) -> dict[str, Any]:
        """An image to keep of a group, or none any more; refused where another has chosen meanwhile."""

        def work(location: Any) -> dict[str, Any]:
            images = _group(service, index, report, group).images
            by_id = {each.id: each for each in images}
            if unknown := [each for each in [*replaces, *([] if image is None else [image])] if each not in by_id]:
                raise KeyError(f"no image {unknown[0]} in this group")
            keep = None if image is None else _named(by_id[image])
            choose_keeper(location, [_named(each) for each in images], keep, [_named(by_id[each]) for each in replaces])
            return {"chosen": image}

        return _store(service, request, index, work)


def _group(service: SearchService, index: int, name: str, number: int) -> DuplicateGroup:
    """A group that someone has seen; also of an index that has changed since, for decisions are on contents."""
    try:
        groups = service.duplicates[index].kept(name, if_index_changed=True).groups
    except ReportGoneError as error:
        raise HTTPException(410, str(error)) from None
    if number >= len(groups):
        raise ValueError(f"no group {number}; there are {len(groups):,}")
    return groups[number]


def _named(image: ImageFile) -> tuple[str, str]:
    return image.hash, image.path


def _decisions(service: SearchService, index: int, offset: int, count: int) -> dict[str, Any]:
    """The last decisions first: images to keep, then pairs that are no duplicates."""
    pairs, kept = read_all(service.searchers[index].index)
    decisions: list[Decision | Keeper] = [*reversed(kept), *reversed(pairs)]
    page = decisions[offset : offset + count]
    hashes = {hash_ for each in page for hash_ in _hashes_of(each)}
    ids = _ids(service, index, sorted(filter(_HASH.fullmatch, hashes)))
    return {
        "decisions": [
            {
                "kind": "keep" if isinstance(each, Keeper) else "not",
                "images": [
                    {"hash": hash_, "path": path, "id": ids.get(hash_)}
                    for hash_, path in zip(_hashes_of(each), _paths_of(each), strict=True)
                ],
                "decided": each.decided,
            }
            for each in page
        ],
        "total": len(decisions),
        "decides": service.stores_decisions(index),
    }


def _hashes_of(decision: Decision | Keeper) -> tuple[str, ...]:
    return (decision.hash,) if isinstance(decision, Keeper) else decision.hashes


def _paths_of(decision: Decision | Keeper) -> tuple[str, ...]:
    return (decision.path,) if isinstance(decision, Keeper) else decision.paths


def _ids(service: SearchService, index: int, hashes: Sequence[str]) -> dict[str, int]:
    """Numbers of images by their contents, of those that the index has."""
    if not hashes:
        return {}
    condition = ", ".join(f"'{each}'" for each in hashes)
    rows = service.searchers[index].table.read(["hash", "id"], f"hash IN ({condition})")
    return dict(zip(rows["hash"].to_pylist(), rows["id"].to_pylist(), strict=True))


def _store(service: SearchService, request: Request, index: int, work: Callable[[Any], dict[str, Any]]) -> Any:
    """What a request has written to the decisions of an index, if it may."""
    if service.read_only:
        raise HTTPException(403, "this service stores no decisions: it was started with --read-only")
    if not service.stores_decisions(index):
        raise HTTPException(403, "decisions are stored in an index of this machine that may be written to")
    if is_from_elsewhere(request.headers):
        raise HTTPException(403, "a decision is sent by the page of this service")

    def written() -> dict[str, Any]:
        try:
            return work(service.searchers[index].index)
        except KeptMeanwhileError as error:
            raise HTTPException(409, str(error)) from None
        except OSError as error:
            reason = error.strerror or "another process writes to it"
            raise HTTPException(503, f"the decision cannot be stored in the index: {reason}") from None

    return translate_errors(written)
