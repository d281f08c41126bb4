"""Limits of a request to the service."""

from dataclasses import dataclass

#: Bytes of a form around the image that is sent in it.
FORM_OVERHEAD_BYTES = 10_000


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        characters: Characters of a term at most.
        terms: Terms of a query at most.
        results: Results of one answer at most.
        offset: Results that can be passed over at most, to continue an answer.
        rerank: First results that are ordered by pair scores at most.
        judged_images: Images of a judged query at most.
        decided_images: Images of a group at most that is decided to be no duplicates.
        upload_bytes: Bytes of an image that is sent.
        seconds: Time after which a request is answered with 503.
    """

    characters: int = 1000
    terms: int = 16
    results: int = 100
    offset: int = 2000
    rerank: int = 64
    judged_images: int = 2000
    decided_images: int = 50
    upload_bytes: int = 20 * 2**20
    seconds: float = 30.0

    @property
    def body_bytes(self) -> int:
        """Bytes of a request's body at most."""
        return self.upload_bytes + FORM_OVERHEAD_BYTES
