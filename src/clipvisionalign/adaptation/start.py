"""What a run started from, and the models between the two."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from clipvisionalign.adaptation.interpolation import interpolate_weights, unshared_names
from clipvisionalign.data.run_data import data_record, is_unfinished, run_chain, run_settings, working_directory_of
from clipvisionalign.data.training_images import TRAINED_ON_FILE, TrainedOnImages
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.device import best_device
from clipvisionalign.models.hub import WeightsNotFound
from clipvisionalign.models.io import is_pretrained, load_aligner
from clipvisionalign.models.packed_linear import pack_linears
from clipvisionalign.models.run_files import weights_file
from clipvisionalign.models.run_names import display_name, resolve_run, snapshot_name
from clipvisionalign.training.init_run import MAX_VECTOR_DIFFERENCE, probe_vectors


def check_tuned(run: str) -> None:
    """Check that a folder is a finished run in which something was trained.

    Args:
        run: what the user gave.

    Raises:
        FileNotFoundError: it is no run folder.
        ValueError: a pretrained model as it is, a run that is not finished, or one of no epochs.
    """
    if is_pretrained(run):
        raise ValueError(
            f"{run}: a pretrained model as it is: nothing was tuned; give a run of 'clipvisionalign train "
            f"--model.pretrained {run}'"
        )
    if weights_file(run) is None:
        raise FileNotFoundError(f"{run}: not a run folder: 'clipvisionalign train' writes one")
    if not (Path(run) / "data.json").is_file():
        raise FileNotFoundError(
            f"{display_name(run)}: has no data.json, so the data that it was trained on are unknown, as those of a "
            "published run are: give the folder that 'clipvisionalign train' wrote"
        )
    if is_unfinished(run):
        raise ValueError(f"{run}: not finished (it has no results.json): clipvisionalign train --resume {run}")
    if run_settings(run).get("epochs") == 0:
        raise ValueError(
            f"{run}: nothing was trained in it (--epochs 0): it is what it started from; give a run of more epochs"
        )


def start_of(run: str) -> str:
    """What a run started from: the run of `--init`, else the pretrained dual encoder.

    Args:
        run: a run folder.

    Returns:
        A run folder, a folder of a pretrained model, or a hub name with its commit.

    Raises:
        ValueError: it started from towers by name with new heads, which are no model to compare with.
    """
    settings = run_settings(run)
    model = settings.get("model") or {}
    name = str(settings.get("init") or model.get("pretrained") or "")
    if not name:
        raise ValueError(
            f"{run}: it started from no model, but from two towers with new heads: nothing to compare it with; give "
            "--with a run that has the same towers, or train one with --init or --model.pretrained"
        )
    from_its_directory = working_directory_of(run) / name
    if from_its_directory.is_dir():
        return str(from_its_directory)
    # A run of the hub is recorded by its folder in the cache of then.
    published = snapshot_name(Path(name))
    with suppress(WeightsNotFound):
        return resolve_run(published) if published else name
    return name


def starts_before(base: str) -> list[str]:
    """What a model that a run started from was itself tuned from.

    Args:
        base: a run, or a pretrained dual encoder.

    Returns:
        The runs and the pretrained model before it, the first model last; empty where it was not tuned from a model.
    """
    starts: list[str] = []
    current = base
    while not is_pretrained(current) and (settings := run_settings(current)):
        if not settings.get("init") and not (settings.get("model") or {}).get("pretrained"):
            break
        current = start_of(current)
        if current in (base, *starts):
            break
        starts.append(current)
    return starts


@dataclass(frozen=True)
class StartOverlap:
    """Training images of a run that its start was trained on before.

    Attributes:
        run: the run of `--init`.
        images: number of the images; of a start without hashes of its images, all of the same data set.
    """

    run: str
    images: int

    def to_dict(self) -> dict[str, Any]:
        """What a JSON file holds of it."""
        return asdict(self)


def start_overlap(run: str | Path) -> StartOverlap | None:
    """The training images of a run that the run of `--init`, or one before that, was trained on.

    Args:
        run: a run folder.

    Returns:
        Their number; None where there are none, or the run started from no other.
    """
    own = data_record(run)
    count = int((own.get("train") or {}).get("images", 0))
    digests = _trained_digests(Path(run))
    seen, known = 0, set[str]()
    for current in islice(run_chain(run), 1, None):
        if run_settings(current).get("epochs") == 0:
            continue
        trained = _trained_digests(current)
        if digests is not None and trained is not None:
            known |= set(trained)
        elif own.get("source") and data_record(current).get("source") == own["source"]:
            seen = count
    seen = max(seen, sum(digest in known for digest in digests or []))
    return StartOverlap(start_of(str(run)), min(seen, count)) if seen else None


def _trained_digests(run: Path) -> list[str] | None:
    """Hashes of the images that a run was trained on; None where it has no file of them, as one of before."""
    path = run / TRAINED_ON_FILE
    return TrainedOnImages.load(path, marks=False).digests if path.is_file() else None


def check_base(base: str, run: str) -> None:
    """Check what can be checked of a base before a model is loaded.

    Args:
        base: a pretrained dual encoder, or a run.
        run: the run that was tuned.

    Raises:
        FileNotFoundError: there is no such run or model.
        ValueError: it is the run itself, or not finished; or a pretrained model where the run has towers by name.
    """
    if Path(base).exists() and Path(base).resolve() == Path(run).resolve():
        raise ValueError(f"--with {base}: that is the run itself; leave --with out for what it started from")
    if is_pretrained(base):
        if not (run_settings(run).get("model") or {}).get("pretrained"):
            raise ValueError(
                f"--with {base}: {run} has two towers by name, and no weights in common with a pretrained dual "
                "encoder; give the run that it started from"
            )
        return
    if weights_file(base) is None:
        raise FileNotFoundError(f"--with {base}: neither a run folder nor a pretrained model; give where it is now")
    if is_unfinished(base):
        raise ValueError(f"--with {base}: not finished (it has no results.json): clipvisionalign train --resume {base}")


class WeightPath:
    """The models between a base and a run that was tuned from it.

    Args:
        run: a finished run.
        base: a run, or a pretrained dual encoder, of the same architecture.
        device: where models are put that are measured.
        ends_alone: whether there are the models at 0 and at 1 alone, which may be of different architectures.

    Raises:
        ValueError: the two are of different architectures, or read captions or images otherwise.
    """

    def __init__(self, run: str, base: str, device: str = "auto", ends_alone: bool = False) -> None:
        self.run, self.base, self.device = run, base, device
        self.tuned = load_aligner(run, "cpu", packed=False)
        published = load_aligner(base, "cpu", packed=False)
        self._published: Aligner | None = None
        self._base_alone: Aligner | None = None
        if ends_alone and unshared_names(self.tuned.state_dict(), published.state_dict()):
            self._base_alone = published
            return
        if published.width != self.tuned.width:
            raise ValueError(
                f"--with {base}: another architecture than {run}: vectors of {published.width} numbers, and of "
                f"{self.tuned.width} in the run, so that no weights are between their heads; 'worth --no-blend' "
                "compares the two all the same"
            )
        # With the run's positions and window, which new parts of it were made for.
        like_run = Aligner(replace(self.tuned.config, pretrained=base)).eval() if is_pretrained(base) else published
        self._own_state, self._base_state = self.tuned.state_dict(), like_run.state_dict()
        if is_pretrained(base):
            # Its late interaction and fusion are new ones, drawn just now.
            self._base_state = {
                name: tensor for name, tensor in self._base_state.items() if not name.startswith(("late.", "fusion."))
            }
        self._check_architecture(like_run)
        #: The base as it is; None where the model at alpha 0 is the same.
        self._published = None if _is_alike(self.tuned, published) else published

    def model_at(self, alpha: float) -> Aligner:
        """The model at (1 - alpha) base + alpha run, ready to encode.

        Args:
            alpha: 0 for the base's weights, 1 for the run's.

        Returns:
            A model of its own, on the device.
        """
        if self._base_alone is not None:
            assert alpha in (0.0, 1.0)
            return self._ready(copy.deepcopy(self.tuned if alpha else self._base_alone))
        return self._ready(self.unpacked_model_at(alpha))

    def unpacked_model_at(self, alpha: float) -> Aligner:
        """The same as `model_at`, on the CPU and to be saved.

        Args:
            alpha: 0 for the base's weights, 1 for the run's.

        Returns:
            A model of its own.
        """
        model = copy.deepcopy(self.tuned)
        model.load_state_dict(interpolate_weights(self._own_state, self._base_state, alpha))
        return model

    def base_model(self) -> Aligner | None:
        """The base as it is by itself; None where it is `model_at(0)`, as it is unless the run has new parts."""
        return None if self._published is None else self._ready(copy.deepcopy(self._published))

    def _ready(self, model: Aligner) -> Aligner:
        pack_linears(model)
        model.to(best_device(self.device)).eval()
        model.show_progress = True
        return model

    def _check_architecture(self, like_run: Aligner) -> None:
        names = unshared_names(self._own_state, self._base_state)
        if names:
            shapes = [
                "none" if name not in state else f"{tuple(state[name].shape)}"
                for state in (self._own_state, self._base_state)
                for name in names[:1]
            ]
            raise ValueError(
                f"--with {self.base}: another architecture than {self.run}: {names[0]} is {shapes[0]} in the run and "
                f"{shapes[1]} in the base; give what the run started from ('worth --no-blend' compares any two)"
            )
        in_run = self.unpacked_model_at(0.0)
        compared = zip(("images", "captions"), probe_vectors(in_run), probe_vectors(like_run), strict=True)
        for what, of_run, of_base in compared:
            difference = float((of_run - of_base).abs().max())
            # Written so that nan is refused too.
            if not difference <= MAX_VECTOR_DIFFERENCE:
                raise ValueError(
                    f"--with {self.base}: with the same weights its {what} have other vectors than in {self.run} (off "
                    f"by {difference:.2g}): another tokenizer, preprocessing or attention; give what the run started "
                    "from"
                )


def _is_alike(tuned: Aligner, base: Aligner) -> bool:
    """Whether a base's weights in the run's architecture are the base: no part on top, captions read alike."""
    if tuned.late is not None or base.late is not None:
        return False
    texts = [
        (model.config.design, model.text_tower.max_tokens, model.config.text_tower.window) for model in (tuned, base)
    ]
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (tuned, base)]
    return texts[0] == texts[1] and shapes[0] == shapes[1]
