"""The audit: whether a model uses forbidden information, and whether splits overlap.

A model that conditions a caption on its true image scores itself, and its recall means nothing. Such a model shows in
what it answers when the true image is not at hand, is not at the same place, or is not the true one: that is what the
checks ask. They use only a model's outputs, so that any model can be audited.

- *Mismatched pairs first.* A model may keep what it answered (by text, by image, by object), and may have been
  evaluated before. So the first questions are captions that nobody has asked before, made of halves of the data's own,
  with mirrored images, dealt at random: no memory can answer them. Positives are shown only afterwards.
- *Chance is what other dealings find* (`chance.py`). Over all such checks of one audit, an honest model fails with a
  probability of at most `FALSE_ALARM_RATE`.
- *The same pair, the same score* (`stable_scores.py`).

What the audit does not see: a model that learned the data's own pairs before, which is what "splits apart" is for; one
that leaks only in lists longer than those that are asked; one that leaks only in its first answers, unless it is given
as it was before it answered anything (or `fresh` makes it so).
"""

from clipvisionalign.retrieval.audit.new_inputs import make_captions, mirrored_images
from clipvisionalign.retrieval.audit.report import AuditReport, Check
from clipvisionalign.retrieval.audit.run import FALSE_ALARM_RATE, MIN_SAMPLE, SAMPLE, audit, audited_images

__all__ = [
    "FALSE_ALARM_RATE",
    "MIN_SAMPLE",
    "SAMPLE",
    "AuditReport",
    "Check",
    "audit",
    "audited_images",
    "make_captions",
    "mirrored_images",
]
